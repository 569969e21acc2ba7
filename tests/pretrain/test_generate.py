"""Sampling: from the carried state, repeatable, equal to the stock class's greedy generation, and whole characters."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_models
from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.pretrain.generate import GenerateConfig, choose_token, generate_text, generate_tokens
from headrace.pretrain.hf import choose_stock_class
from headrace.pretrain.hf.verify import load_stock_model
from headrace.pretrain.saved_run import load_run

VOCAB = 400
GREEDY = GenerateConfig(max_new_tokens=30, temperature=0)
TINY = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "tie_embeddings": False,
    "mamba2": Mamba2Config(head_dim=8, d_state=8, num_groups=2),
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, rope_fraction=1.0),
}
NO_ROPE = AttentionConfig(num_heads=4)
LIMITED = dataclasses.replace(TINY["mamba2"], dt_limit=(0.0, 0.3))
SIGMOID = {"score": "sigmoid", "balance": "bias", "activation": "relu2"}
NORMED = Mamba1Config(d_state=4, inner_norms=True)
CONFIGS = {
    "pure mamba2": ModelConfig(**TINY, pattern="3*mamba2"),
    "pure mamba1": ModelConfig(**TINY, pattern="3*mamba1", mamba1=Mamba1Config(d_state=4)),
    "step limits, which stock classes forget in their cache": ModelConfig(
        **{**TINY, "mamba2": LIMITED}, pattern="2*mamba2"
    ),
    "nemotron": ModelConfig(
        **{**TINY, "attention": NO_ROPE}, pattern="mamba2 attention mlp", mlp=MLPConfig(activation="relu2")
    ),
    "nemotron without attention": ModelConfig(**TINY, pattern="mamba2 mlp", mlp=MLPConfig(activation="relu2")),
    "granite with rope": ModelConfig(**TINY, pattern="2*(mamba2 mlp) attention mlp"),
    "granite without attention": ModelConfig(**TINY, pattern="2*(mamba2 mlp)"),
    "nemotron with experts": ModelConfig(
        **{**TINY, "attention": NO_ROPE}, pattern="mamba2 moe attention moe", moe=MoEConfig(d_hidden=24, **SIGMOID)
    ),
    "nemotron with experts, without attention": ModelConfig(
        **TINY, pattern="2*(mamba2 moe)", moe=MoEConfig(d_hidden=24, **SIGMOID)
    ),
    "granite with experts": ModelConfig(
        **TINY, pattern="mamba2 moe attention moe", moe=MoEConfig(d_hidden=24, renormalize=True)
    ),
    "jamba": ModelConfig(
        **{**TINY, "attention": NO_ROPE},
        pattern="mamba1 moe attention mlp",
        mamba1=NORMED,
        mlp=MLPConfig(d_hidden=24),
        moe=MoEConfig(d_hidden=24),
    ),
    "jamba without attention": ModelConfig(**TINY, pattern="2*(mamba1 moe)", mamba1=NORMED, moe=MoEConfig(d_hidden=24)),
    "bamba": ModelConfig(**TINY, pattern="mamba2 mlp attention mlp", mlp=MLPConfig(bias=True)),
    "bamba without attention": ModelConfig(**TINY, pattern="mamba2 mlp", mlp=MLPConfig(bias=True)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_models.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def model():
    return hf_models.random_model(CONFIGS["granite with rope"], 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_the_stock_class(name, tmp_path):
    """With no options given: what a user gets from `generate()` on the export."""
    pytest.importorskip("transformers")
    model = hf_models.random_model(CONFIGS[name], 4)
    stock = choose_stock_class(model.config)
    assert name.split()[0] not in ("nemotron", "granite", "bamba", "jamba") or name.split()[0] in stock.model_type
    hf_models.write_folder(model, stock, tmp_path)
    prompt = [1, 17, 300, 17, 4]
    ours = list(generate_tokens(model, prompt, GREEDY, eos_id=-1))
    stock_model = load_stock_model(tmp_path)
    theirs = stock_model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(prompt) :].tolist()
    assert len(set(ours)) > 3


def test_each_token_is_the_most_probable_of_a_full_forward_pass(model):
    tokens = [1, 5, 9]
    for token in generate_tokens(model, list(tokens), GREEDY, eos_id=-1):
        with torch.no_grad():
            assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    def text(seed):
        return "".join(generate_text(model, tokenizer, "import ", GenerateConfig(max_new_tokens=40, seed=seed)))

    before = torch.get_rng_state()
    assert text(1) == text(1)
    assert text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_eos_ends_the_text_and_is_not_part_of_it(model):
    tokens = list(generate_tokens(model, [1, 5], GREEDY, eos_id=-1))
    end = tokens[8]
    assert list(generate_tokens(model, [1, 5], GREEDY, eos_id=end)) == tokens[: tokens.index(end)]


def test_pieces_join_to_the_text_of_the_tokens(model, tokenizer):
    """A random model writes many byte pieces, whole characters and broken ones among them."""
    config = GenerateConfig(max_new_tokens=300, temperature=2.0)
    prompt = [tokenizer.bos_id, *tokenizer.encode("x = ")]
    tokens = list(generate_tokens(model, prompt, config, eos_id=tokenizer.eos_id))
    assert "".join(generate_text(model, tokenizer, "x = ", config)) == tokenizer.decode(tokens)


def test_rows_that_pad_the_vocabulary_are_never_drawn(tokenizer):
    padded = hf_models.random_model(ModelConfig(**{**TINY, "vocab_size": VOCAB + 200}, pattern="mamba2"), 1)
    with torch.no_grad():
        padded.lm_head.weight[VOCAB:] *= 50
    tokens = list(generate_tokens(padded, [1], GenerateConfig(temperature=5.0), eos_id=-1, num_ids=VOCAB))
    assert max(tokens) < VOCAB
    assert max(generate_tokens(padded, [1], GenerateConfig(temperature=5.0), eos_id=-1)) >= VOCAB
    assert "".join(generate_text(padded, tokenizer, "", GREEDY))


def test_a_tiny_temperature_is_as_good_as_greedy():
    config = GenerateConfig(temperature=1e-40)
    assert choose_token(torch.tensor([1.0, 9.0, 8.99]), config, torch.Generator()) == 1


def test_a_character_of_several_bytes_comes_out_whole(model, tokenizer, monkeypatch):
    text = "né 漢字 🙂!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    monkeypatch.setattr("headrace.pretrain.generate.generate_tokens", lambda *_args, **_options: iter(ids))
    pieces = list(generate_text(model, tokenizer, "", GREEDY))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_a_step_costs_the_same_however_long_the_text(tokenizer):
    """Mamba-2 alone: single-token passes from a state that does not grow."""
    model = hf_models.random_model(CONFIGS["pure mamba2"], 1)
    lengths, states = [], []
    forward = model.forward

    def watched(tokens_BL, seq, **options):
        lengths.append(tokens_BL.shape[1])
        logits = forward(tokens_BL, seq, **options)
        states.append(seq.states.num_bytes())
        return logits

    model.forward = watched
    list(generate_tokens(model, [1] * 50, GREEDY, eos_id=-1))
    assert lengths == [50] + [1] * 29
    assert len(set(states)) == 1


LOGITS = st.lists(st.floats(-20, 20).map(lambda value: round(value, 3)), min_size=1, max_size=30)


@given(logits=LOGITS, k=st.integers(1, 40), p=st.floats(0.01, 1), t=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_a_drawn_token_is_among_those_allowed(logits, k, p, t, seed):
    logits_V = torch.tensor(logits)
    config = GenerateConfig(temperature=t, top_k=k, top_p=p)
    token = choose_token(logits_V, config, torch.Generator().manual_seed(seed))
    better = [value for value in logits if value > logits[token]]
    assert len(better) < k
    p_V = (logits_V / t).double().softmax(0)
    top = sorted(p_V.tolist(), reverse=True)[:k]
    assert sum(p_V[logits_V > logits_V[token]].tolist()) <= p * sum(top) + 1e-9


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([1.0, 3.0, 0.0, 2.0])
    config = GenerateConfig(temperature=2.0, top_k=3)
    draws = torch.tensor([choose_token(logits_V, config, generator) for _ in range(4000)])
    wanted = torch.tensor([0.5, 1.5, -torch.inf, 1.0]).softmax(0)
    torch.testing.assert_close(draws.bincount(minlength=4) / 4000, wanted, atol=0.03, rtol=0)
    nucleus = GenerateConfig(temperature=1.0, top_p=0.6)  # 0.64 of the probability lies on the first alone
    assert {choose_token(logits_V, nucleus, generator) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_a_user_error(field, value, model, tokenizer):
    with pytest.raises(UserError, match=f"{field}=.* must"):
        generate_text(model, tokenizer, "", GenerateConfig(**{field: value}))


def test_a_tokenizer_too_large_for_the_model_is_a_user_error(tokenizer):
    small = hf_models.random_model(ModelConfig(**{**TINY, "vocab_size": 100}, pattern="mamba2"), 1)
    with pytest.raises(UserError, match="400 pieces, the model knows 100"):
        generate_text(small, tokenizer, "", GREEDY)


def test_a_run_and_its_checkpoint_load_to_the_same_model(model, tokenizer, tmp_path):
    checkpoint = hf_models.write_run(tmp_path / "run", model, tokenizer)
    tokens_BL = torch.arange(20)[None]
    with torch.no_grad():
        wanted_BLV = model(tokens_BL)
        for source in (tmp_path / "run", checkpoint):
            loaded, loaded_tokenizer, config = load_run(source)
            assert torch.equal(loaded(tokens_BL), wanted_BLV)
            assert loaded_tokenizer.hash == tokenizer.hash
            assert config.run.name == "run"
            assert not loaded.training


def test_a_run_without_a_checkpoint_or_with_another_models_is_a_user_error(model, tokenizer, tmp_path):
    checkpoint = hf_models.write_run(tmp_path / "run", model, tokenizer)
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("d_model = 16", "d_model = 32"))
    with pytest.raises(UserError, match="another shape"):
        load_run(tmp_path / "run")
    config.write_text(
        config.read_text().replace("d_model = 32", "d_model = 16").replace("2*(mamba2 mlp)", "9*(mamba2 mlp)")
    )
    with pytest.raises(UserError, match="has no tensor"):
        load_run(checkpoint)
    checkpoint.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_run(tmp_path / "run")
