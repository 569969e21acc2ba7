"""Every layer kind keeps the contract: counts, causality, documents, first values, streaming, cutting rules."""

import pytest
import torch

from headrace.model import HybridLM, LayerStates, ModelConfig, SequenceContext
from headrace.model.registry import LAYER_KINDS

B, L = 2, 45


def draw_tokens(config: ModelConfig, rows: int = B) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, L), generator=torch.Generator().manual_seed(1))


def draw_resets(rows: int = B) -> torch.Tensor:
    return torch.rand(rows, L, generator=torch.Generator().manual_seed(2)) < 0.1


def test_small_models_use_every_kind(small_models: dict[str, ModelConfig]) -> None:
    assert {kind for config in small_models.values() for kind in config.kinds} == set(LAYER_KINDS)


def test_counts_equal_what_is_built(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = HybridLM(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())
    for layer, block in zip(config.layers, model.layers.values(), strict=True):
        assert layer.num_params(config.d_model) == sum(p.numel() for p in block.mixer.parameters())


@torch.no_grad()
def test_no_token_sees_a_later_one(model: HybridLM) -> None:
    tokens = draw_tokens(model.config)
    changed = tokens.clone()
    changed[:, 20:] = (tokens[:, 20:] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@torch.no_grad()
def test_no_document_sees_another(model: HybridLM) -> None:
    tokens = draw_tokens(model.config)
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, [0, 17, 18]] = True
    reset[1, [5, 30]] = True
    seq = SequenceContext(reset_BL=reset)
    whole = model(tokens, seq)
    for row, (start, end) in ((0, (0, 17)), (0, (17, 18)), (0, (18, L)), (1, (0, 5)), (1, (5, 30)), (1, (30, L))):
        alone = model(tokens[row : row + 1, start:end])
        torch.testing.assert_close(whole[row : row + 1, start:end], alone, rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[1, 5:30] = (tokens[1, 5:30] + 1) % model.config.vocab_size
    others = torch.ones(B, L, dtype=torch.bool)
    others[1, 5:30] = False
    again = model(changed, SequenceContext(reset_BL=reset))
    torch.testing.assert_close(again[others], whole[others], rtol=0, atol=1e-12)


def test_no_gradient_crosses_a_document_start(model: HybridLM) -> None:
    reset = torch.zeros(1, L, dtype=torch.bool)
    reset[0, 17] = True
    captured: list[torch.Tensor] = []
    model.embed.register_forward_hook(lambda module, args, output: captured.append(output) or output.retain_grad())
    model(draw_tokens(model.config, 1), SequenceContext(reset_BL=reset))[:, 17:].square().sum().backward()
    assert captured[0].grad is not None
    assert captured[0].grad[:, :17].abs().max() < 1e-12
    assert captured[0].grad[:, 17:].abs().min(-1).values.max() > 0


def test_first_values_cover_everything_and_repeat(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = HybridLM(config)
    first, second, other = (dict(model.initial_values(seed)) for seed in (0, 0, 1))
    assert first.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert first[name].shape == parameter.shape
        assert first[name].dtype == torch.float32
        assert first[name].isfinite().all()
        assert torch.equal(first[name], second[name])
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_forgotten_first_values_show(config: ModelConfig) -> None:
    assert all(parameter.isnan().all() for parameter in HybridLM(config).parameters())


def test_every_parameter_gets_a_gradient(model: HybridLM) -> None:
    loss, count = model(draw_tokens(model.config), SequenceContext(draw_resets()), draw_tokens(model.config))
    (loss / count).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("cuts", [(1,) * L, (20, 1, 1, 2, 0, 21), (44, 1), (2, 3, 1, 38, 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
def test_pieces_equal_the_whole(model: HybridLM, cuts: tuple[int, ...], packed: bool, grad: bool) -> None:
    tokens = draw_tokens(model.config)
    reset = draw_resets() if packed else None
    with torch.set_grad_enabled(grad):
        whole = model(tokens, SequenceContext(reset_BL=reset))
        states, pieces, start = LayerStates(), [], 0
        for length in (n for n in cuts if n):
            span = slice(start, start + length)
            seq = SequenceContext(reset_BL=None if reset is None else reset[:, span], states=states)
            pieces.append(model(tokens[:, span], seq))
            start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, L])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_equal_the_states_kept(config: ModelConfig, length: int, dtype: torch.dtype) -> None:
    model = HybridLM(config).to(dtype)
    states = LayerStates()
    for start in range(length):
        model(draw_tokens(config, 1)[:, start : start + 1], SequenceContext(states=states))
    assert states.num_bytes() == config.state_bytes(length, element_bytes=dtype.itemsize)


def test_cutting_rules_fit(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = HybridLM(config)
    rules = model.shard_rules()
    assert rules.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        rule = rules[name]
        if rule.dim is not None:
            assert rule.unit in {"heads", "groups", "kv_heads", "channels", "hidden", "vocabulary"}
            assert parameter.shape[rule.dim] % rule.count == 0, name
    cut_matrices = [name for name, kind in model.parameter_kinds().items() if kind == "matrix"]
    assert all(rules[name].dim is not None for name in cut_matrices)


def test_decay_spares_vectors_and_ssm_parameters(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = HybridLM(config)
    spared = model.no_decay_names()
    for name, parameter in model.named_parameters():
        expected = parameter.dim() == 1 or name.endswith(("A_log", "dt_bias", ".D"))
        assert (name in spared) == expected, name
