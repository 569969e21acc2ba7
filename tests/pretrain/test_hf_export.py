"""Export of a run: stock classes load it, it reads back to the same tensors, and nothing is left half-written."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_models
from headrace.errors import UserError
from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.presets import PRESETS
from headrace.pretrain.hf import choose_stock_class, export_hf, import_hf
from headrace.pretrain.hf import export as export_module
from headrace.pretrain.hf.export import write_configs
from headrace.pretrain.hf.import_model import published_name
from headrace.pretrain.hf.mapping import joins
from headrace.pretrain.hf.stock_folder import plan_shards, read_weights
from headrace.pretrain.hf.verify import compare_with_stock, load_stock_model
from headrace.pretrain.saved_run import parameter_shapes

transformers = pytest.importorskip("transformers")
core_model_loading = pytest.importorskip("transformers.core_model_loading")


MAMBA2 = Mamba2Config(head_dim=8, d_state=8)
ATTENTION = AttentionConfig(num_heads=4)
TINY = {"vocab_size": 400, "d_model": 16, "mamba2": MAMBA2, "attention": ATTENTION}
HYBRIDS = {
    "Mamba2ForCausalLM": ModelConfig(**TINY, pattern="2*mamba2"),
    "MambaForCausalLM": ModelConfig(**TINY, pattern="2*mamba1", mamba1=Mamba1Config(d_state=4)),
    "NemotronHForCausalLM": ModelConfig(
        **TINY, pattern="mamba2 attention mlp mlp", mlp=MLPConfig(d_hidden=24, activation="relu2")
    ),
    "GraniteMoeHybridForCausalLM": ModelConfig(**TINY, pattern="2*(mamba2 mlp) attention mlp"),
    "BambaForCausalLM": ModelConfig(
        **{**TINY, "attention": dataclasses.replace(ATTENTION, rope_fraction=0.5)}, pattern="mamba2 mlp attention mlp"
    ),
    "JambaForCausalLM": ModelConfig(
        **TINY,
        pattern="mamba1 mlp attention moe mamba1 mlp mamba1 moe",
        mamba1=Mamba1Config(d_state=4, inner_norms=True),
        mlp=MLPConfig(d_hidden=24),
        moe=MoEConfig(d_hidden=24),
    ),
    "NemotronHForCausalLM, experts": ModelConfig(
        **TINY,
        pattern="mamba2 moe attention moe",
        moe=MoEConfig(score="sigmoid", balance="bias", activation="relu2", d_hidden=24, d_shared=20, num_groups=2),
    ),
    "GraniteMoeHybridForCausalLM, experts": ModelConfig(
        **TINY, pattern="mamba2 moe attention moe", moe=MoEConfig(renormalize=True, d_hidden=24, d_shared=20)
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_models.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def run(tmp_path, tokenizer):
    """The folder of a run with a small hybrid model."""
    hf_models.write_run(tmp_path / "run", hf_models.random_model(HYBRIDS["NemotronHForCausalLM"], 1), tokenizer)
    return tmp_path / "run"


@pytest.mark.parametrize("name", HYBRIDS)
def test_round_trip_through_stock_classes(name, tokenizer, tmp_path):
    model, architecture = hf_models.random_model(HYBRIDS[name], 3), name.partition(",")[0]
    checkpoint = hf_models.write_run(tmp_path / "run", model, tokenizer)
    report = export_hf(tmp_path / "run")
    assert (report.folder, report.architecture) == (tmp_path / "run" / "hf", architecture)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4
    assert architecture in str(report)
    modes = {path.stat().st_mode & 0o777 for path in report.folder.iterdir()}
    assert modes == {(tmp_path / "run/config.toml").stat().st_mode & 0o777}

    stock_model = transformers.AutoModelForCausalLM.from_pretrained(report.folder)
    stock_tokenizer = transformers.AutoTokenizer.from_pretrained(report.folder)
    assert type(stock_model).__name__ == architecture
    text = "import os\n\n\ndef f(x):\n    return x  # naïve 漢字 🙂 <s>\n"
    ids = stock_tokenizer(text, return_tensors="pt")
    assert ids["input_ids"].tolist() == [[tokenizer.bos_id, *tokenizer.encode(text)]]
    with torch.no_grad():
        torch.testing.assert_close(stock_model(**ids).logits, model(ids["input_ids"]), atol=1e-4, rtol=1e-4)
    settings = stock_model.config
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert stock_model.generation_config.pad_token_id == tokenizer.pad_id

    config, weights = import_hf(report.folder)
    original = dict(model.named_parameters())
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    assert config.num_params() == model.config.num_params()
    assert (config.tie_embeddings, config.norm_eps) == (model.config.tie_embeddings, model.config.norm_eps)
    assert export_hf(checkpoint, tmp_path / "again", verify=False).max_logit_difference is None
    assert (tmp_path / "again/model.safetensors").read_bytes() == (report.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model_type", [*hf_models.MODEL_TYPES, *hf_models.EXPERT_MODELS])
@pytest.mark.parametrize("seed", range(5))
def test_import_gives_back_every_option_that_matters(model_type, seed, tmp_path):
    model = hf_models.random_model(hf_models.config_of(model_type, seed), seed)
    hf_models.write_folder(model, hf_models.stock_of(model_type), tmp_path)
    config, weights = import_hf(tmp_path)
    original = dict(model.named_parameters())
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    reread = hf_models.random_model(config, seed)
    reread.load_state_dict(weights)
    tokens_BL = torch.randint(0, hf_models.VOCAB, (1, 30), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(reread(tokens_BL), model(tokens_BL), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "nemotron_h", "granitemoehybrid", "jamba", *hf_models.EXPERT_MODELS])
def test_import_reads_what_transformers_itself_saves(model_type, tmp_path):
    model = hf_models.random_model(hf_models.config_of(model_type, 2), 2)
    (tmp_path / "ours").mkdir()
    hf_models.write_folder(model, hf_models.stock_of(model_type), tmp_path / "ours")
    load_stock_model(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    _, weights = import_hf(tmp_path / "theirs")
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_weights_in_several_files_load_the_same(tmp_path):
    model = hf_models.random_model(HYBRIDS["BambaForCausalLM"], 5)
    stock = choose_stock_class(model.config)
    hf_models.write_folder(model, stock, tmp_path, shard_bytes=10_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in read_weights(tmp_path).values())
    tokens_BL = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_stock_model(tmp_path)(tokens_BL).logits, model(tokens_BL), atol=1e-4, rtol=1e-4)
    _, weights = import_hf(tmp_path)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_a_shard_holds_as_much_as_fits_and_at_least_one_tensor():
    shapes = {"a": (10,), "b": (10,), "c": (100,), "d": (1,)}
    assert list(plan_shards(shapes, 80).values()) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards(shapes, 10**9) == {"model.safetensors": ["a", "b", "c", "d"]}


def with_(config=None, **changes):
    return dataclasses.replace(config or HYBRIDS["GraniteMoeHybridForCausalLM"], **changes)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (with_(pattern="3*mamba2"), "Mamba2ForCausalLM"),
        (with_(pattern="3*mamba1"), "MambaForCausalLM"),
        (with_(pattern="mamba2", mamba2=dataclasses.replace(MAMBA2, num_heads=3)), "NemotronHForCausalLM"),
        (with_(pattern="mlp mamba2 attention", mlp=MLPConfig(activation="gelu")), "NemotronHForCausalLM"),
        (with_(attention=dataclasses.replace(ATTENTION, rope_fraction=1.0)), "GraniteMoeHybridForCausalLM"),
        (with_(pattern="attention mlp"), "GraniteMoeHybridForCausalLM"),
        (
            with_(attention=dataclasses.replace(ATTENTION, rope_fraction=1.0), mlp=MLPConfig(bias=True)),
            "BambaForCausalLM",
        ),
    ],
)
def test_the_stock_class_that_fits_is_chosen_and_loads(config, architecture, tmp_path):
    stock = choose_stock_class(config)
    assert stock.architecture == architecture
    model = hf_models.random_model(config, 1)
    hf_models.write_folder(model, stock, tmp_path)
    with torch.no_grad():
        logits_BLV = load_stock_model(tmp_path)(torch.arange(20)[None]).logits
    torch.testing.assert_close(model(torch.arange(20)[None]), logits_BLV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mamba-130m", "mamba-2.8b", "mamba2-130m", "mamba2-2.7b", "mamba2-hybrid-8b"])
def test_published_sizes_have_the_tensors_of_their_stock_class(name, tmp_path):
    config = PRESETS[name]
    stock = choose_stock_class(config)
    shapes = parameter_shapes(config)
    write_configs(tmp_path, stock, config, hf_models.SPECIAL, context_length=2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    saved = core_model_loading.revert_weight_conversion(model, dict(model.named_parameters()) | buffers)
    theirs = {published_name(name, stock.names): tuple(tensor.shape) for name, tensor in saved.items()}
    assert theirs == {join.stock: join.shape for join in joins(stock.names, config, shapes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "sliding_attention mlp mamba2 mlp"}, "sliding_attention layers .leave them out"),
        ({"mamba2": dataclasses.replace(MAMBA2, norm_before_gate=True)}, "norm_before_gate=true .use false"),
        ({"mamba2": dataclasses.replace(MAMBA2, skip="channel")}, 'skip="channel" .use "head"'),
        ({"mamba2": dataclasses.replace(MAMBA2, gated_norm="none")}, 'gated_norm="none" .use "group"'),
        ({"mamba2": dataclasses.replace(MAMBA2, gated_norm="whole", num_groups=2)}, 'gated_norm="whole"'),
        ({"pattern": "mamba1", "mamba1": Mamba1Config(inner_norms=True)}, "mamba1.inner_norms=true .use false"),
        ({"pattern": "mamba1", "mamba1": Mamba1Config(expand=1.5)}, "mamba1.expand=1.5 .use a whole number"),
        ({"pattern": "mamba1 mlp attention mlp"}, "Jamba.* lacks model.mamba1.inner_norms=false .use true"),
        ({"pattern": "2*mamba2 mlp attention mlp"}, "follow every mixer"),
        ({"mlp": MLPConfig(bias=True)}, "mlp.bias=true .use false.*or BambaForCausalLM lacks .*rope_fraction=0"),
    ],
)
def test_what_no_stock_class_computes_is_refused_with_the_nearest_setting(changes, message, tokenizer, tmp_path):
    model = hf_models.random_model(with_(**changes), 1)
    hf_models.write_run(tmp_path / "run", model, tokenizer)
    with pytest.raises(UserError, match=f"no stock Hugging Face class.*({message})"):
        export_hf(tmp_path / "run")
    assert not (tmp_path / "run/hf").exists()


def test_what_is_in_the_way_is_kept_and_an_earlier_export_replaced(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no earlier export"):
        export_hf(run, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    export_hf(run, out)
    first = (out / "model.safetensors").read_bytes()
    hf_models.write_run(run, hf_models.random_model(HYBRIDS["NemotronHForCausalLM"], 2), tokenizer_of(run), step=8)
    export_hf(run, out)
    assert (out / "model.safetensors").read_bytes() != first
    assert json.loads((out / "headrace.json").read_text())["checkpoint"] == "step-00000008"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def tokenizer_of(run: Path):
    from headrace.data import Tokenizer

    return Tokenizer.load(run)


@pytest.mark.parametrize("failing", ["convert_tokenizer", "write_model", "compare_with_stock"])
def test_a_failure_leaves_nothing_and_keeps_the_earlier_export(run, failing, monkeypatch):
    export_hf(run)
    before = {path.name: path.read_bytes() for path in (run / "hf").iterdir()}

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, failing, fail)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        export_hf(run)
    assert {path.name: path.read_bytes() for path in (run / "hf").iterdir()} == before
    assert not list(run.glob(".hf*"))


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one(run, monkeypatch):
    export_hf(run, verify=False)
    before = {path.name: path.read_bytes() for path in (run / "hf").iterdir()}
    rename = Path.rename

    def fail_at_the_end(self, target):
        if self.name == ".hf.new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    with pytest.raises(UserError, match="Input/output error"):
        export_hf(run, verify=False)
    assert {path.name: path.read_bytes() for path in (run / "hf").iterdir()} == before
    monkeypatch.undo()
    (run / ".hf.new").mkdir()  # as an export that was killed leaves it
    export_hf(run, verify=False)
    assert not list(run.glob(".hf*"))


def test_the_check_finds_a_tensor_in_the_wrong_place(run, tokenizer, monkeypatch):
    export_hf(run)
    config, weights = import_hf(run / "hf")
    swapped = {**weights, "layers.0.mixer.in_B.weight": weights["layers.0.mixer.in_C.weight"]}
    model = hf_models.random_model(config, 1)
    model.load_state_dict(swapped)
    with pytest.raises(RuntimeError, match="computes other logits"):
        compare_with_stock(run / "hf", model, tokenizer)
    fields = json.loads((run / "hf/config.json").read_text())
    (run / "hf/config.json").write_text(json.dumps({**fields, "mlp_bias": True}))
    with pytest.raises(RuntimeError, match=r"does not load the export exactly.*missing_keys"):
        load_stock_model(run / "hf")


def test_another_tokenizer_or_checkpoint_is_a_user_error(run, tmp_path):
    other = hf_models.train_tokenizer(tmp_path / "other.model", vocab_size=380)
    (run / "tokenizer.model").write_bytes(other.model)
    with pytest.raises(UserError, match="is not the tokenizer this model was trained with"):
        export_hf(run)
    (run / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.model"):
        export_hf(run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("d_model = 16", "d_model = 32"))
    (run / "tokenizer.model").write_bytes((tmp_path / "other.model").read_bytes())
    with pytest.raises(UserError):
        export_hf(run)


def test_missing_run_missing_checkpoint_missing_transformers(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        export_hf(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run folder and no checkpoint"):
        export_hf(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'headrace\[hf\]'"):
        export_hf(run)
    assert export_hf(run, verify=False).num_tensors > 0


def change_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' cannot be read; known are mamba2"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'"),
        ({"hybrid_override_pattern": "MGM*"}, "layers that cannot be read: G"),
        ({"hybrid_override_pattern": "M*-"}, "left over"),
        ({"mlp_bias": True}, "missing"),
        ({"ssm_state_size": 16}, "has shape"),
        ({"n_groups": 3}, "num_groups=3 does not divide"),
    ],
)
def test_import_refuses_what_it_cannot_compute(run, changes, message):
    export_hf(run, verify=False)
    change_config(run / "hf", **changes)
    with pytest.raises(UserError, match=message):
        import_hf(run / "hf")


def test_import_reads_no_pickle_and_says_so(run):
    export_hf(run, verify=False)
    (run / "hf/model.safetensors").rename(run / "hf/pytorch_model.bin")
    with pytest.raises(UserError, match="pickles are not opened"):
        import_hf(run / "hf")
    (run / "hf/model.safetensors").write_bytes((run / "hf/pytorch_model.bin").read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        import_hf(run / "hf")


def test_stock_models_load_from_the_repository_root(tmp_path):
    """There transformers finds our `kernels/` where it looks for a package of that name."""
    for name, config in HYBRIDS.items():
        (tmp_path / name).mkdir()
        hf_models.write_folder(hf_models.random_model(config, 1), choose_stock_class(config), tmp_path / name)
    code = (
        "import sys, torch, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    print(type(model).__name__, tuple(model(torch.arange(9)[None]).logits.shape))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in HYBRIDS)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [f"{name.partition(',')[0]} (1, 9, 400)" for name in HYBRIDS], done.stderr


def test_transformers_does_not_register_our_operators_again_from_the_repository_root():
    """It once did: it imports `kernels`, and calls to the operators registered first then corrupted memory."""
    code = (
        "import sys, torch, headrace.kernels\n"
        "operator = torch.ops.headrace.causal_conv1d.default\n"
        "import transformers\n"
        "assert transformers.utils.is_kernels_available() is False\n"
        "assert 'kernels' in sys.modules, 'transformers has another way to look: is this test still needed?'\n"
        "print([name for name in sys.modules if name.startswith('kernels.')])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_importing_the_conversion_loads_no_transformers():
    code = "import sys, headrace.pretrain.hf, headrace.pretrain.generate; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
