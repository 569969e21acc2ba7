"""Random small models, and the stock transformers models that hold the same weights."""

import dataclasses
import random
from pathlib import Path

import torch

from headrace.data import DataConfig, Tokenizer
from headrace.model.config import ModelConfig
from headrace.model.ffns.mlp import MLPConfig
from headrace.model.ffns.moe import MoEConfig
from headrace.model.lm import HybridLM
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.pretrain.checkpoint import save_checkpoint
from headrace.pretrain.config import Config, RunConfig, TrainConfig
from headrace.pretrain.hf.export import write_configs, write_model
from headrace.pretrain.hf.stock import STOCK_CLASSES

VOCAB = 61
MODEL_TYPES = ["mamba2", "mamba", "nemotron_h", "bamba", "granitemoehybrid", "jamba"]
EXPERT_MODELS = ["nemotron_h moe", "granitemoehybrid moe", "jamba moe"]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def random_mamba2(rng: random.Random, d_model: int, *, whole_expand: bool, upper_limit: bool) -> Mamba2Config:
    head_dim = rng.choice([4, 8])
    heads = rng.choice([1, 2]) * d_model // head_dim if whole_expand else rng.choice([2, 3, 6])
    groups = rng.choice([g for g in (1, 2, 3, 4) if heads % g == 0])
    high = rng.choice([float("inf"), 0.5]) if upper_limit else float("inf")
    return Mamba2Config(
        num_heads=heads,
        head_dim=head_dim,
        d_state=rng.choice([4, 7, 16]),
        num_groups=groups,
        d_conv=rng.choice([2, 3, 4]),
        chunk_size=rng.choice([5, 8, 64]),
        conv_bias=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        gated_norm="group" if groups > 1 else rng.choice(["group", "whole"]),
        dt_limit=(rng.choice([0.0, 0.05]), high),
    )


def random_attention(rng: random.Random, d_model: int, rope_fractions: list[float], *, bias: bool) -> AttentionConfig:
    heads, ratio = rng.choice([(4, 1), (4, 2), (4, 4), (2, 2)])
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads // ratio,
        head_dim=rng.choice([None, 8, 12]) if d_model // heads % 4 == 0 else 12,
        rope_fraction=rng.choice(rope_fractions),
        rope_theta=rng.choice([10000.0, 500.0]),
        bias=bias and rng.random() < 0.5,
    )


def random_mamba1(rng: random.Random, *, inner_norms: bool) -> Mamba1Config:
    return Mamba1Config(
        expand=rng.choice([1, 2]),
        d_state=rng.choice([1, 3, 8]),
        d_conv=rng.choice([2, 3, 4]),
        dt_rank=rng.choice([None, 1, 3]),
        conv_bias=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        inner_norms=inner_norms,
    )


def random_experts(rng: random.Random, model_type: str) -> MoEConfig:
    """Experts that the stock class has; the options that only training knows are drawn too."""
    experts, top_k = rng.choice([(4, 1), (6, 2), (8, 3)])
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        d_hidden=12,
        balance=rng.choice(["loss", "sinkhorn", "none"]),
        jitter=rng.choice([0.0, 0.1]),
        z_loss=rng.choice([0.0, 0.1]),
    )
    if model_type == "jamba":
        return moe
    moe = dataclasses.replace(moe, renormalize=True, d_shared=rng.choice([0, 20]))
    if model_type == "granitemoehybrid":
        return moe
    groups = rng.choice([(1, 1), (2, 1), (2, 2)]) if top_k < 3 else (1, 1)
    return dataclasses.replace(
        moe,
        score="sigmoid",
        balance="bias",
        renormalize=rng.random() < 0.5,
        scale=rng.choice([1.0, 2.5]),
        num_groups=groups[0],
        top_groups=groups[1],
    )


def random_expert_model(model_type: str, seed: int) -> ModelConfig:
    """As `random_config`, with at least one layer of experts."""
    rng = random.Random(f"experts {model_type} {seed}")
    config = random_config(model_type, seed)
    moe = random_experts(rng, model_type)
    if model_type == "granitemoehybrid":
        return dataclasses.replace(config, pattern=config.pattern.replace("mlp", "moe"), moe=moe)
    if model_type == "nemotron_h":
        kinds = [*config.kinds, "moe", rng.choice(["mamba2", "moe", "attention"])]
        rng.shuffle(kinds)
        mlp = dataclasses.replace(config.mlp, bias=False)
        moe = dataclasses.replace(moe, activation=mlp.activation)
        return dataclasses.replace(config, pattern=" ".join(kinds), mlp=mlp, moe=moe)
    return dataclasses.replace(config, pattern=rng.choice(JAMBA_PATTERNS), moe=moe)


JAMBA_PATTERNS = [
    "mamba1 moe",
    "mamba1 mlp mamba1 moe",
    "2*(mamba1 mlp attention moe)",
    "mamba1 moe attention mlp mamba1 mlp mamba1 moe attention mlp",
    "attention moe mamba1 moe",
]


def config_of(case: str, seed: int) -> ModelConfig:
    """A random model of a model type, or with experts where `case` says so: "nemotron_h moe"."""
    model_type, _, experts = case.partition(" ")
    return random_expert_model(model_type, seed) if experts else random_config(model_type, seed)


def random_config(model_type: str, seed: int) -> ModelConfig:
    """A model that the stock class of `model_type` can express, its options drawn from a seed."""
    rng = random.Random(f"{model_type} {seed}")
    d_model = rng.choice([16, 24])
    common = {
        "vocab_size": VOCAB,
        "d_model": d_model,
        "tie_embeddings": rng.random() < 0.5,
        "norm_eps": rng.choice([1e-5, 1e-3]),
        "residual_in_fp32": rng.random() < 0.5,
    }
    if model_type == "mamba2":
        mamba = random_mamba2(rng, d_model, whole_expand=True, upper_limit=True)
        return ModelConfig(**common, pattern=f"{rng.randint(1, 4)}*mamba2", mamba2=mamba)
    if model_type == "mamba":
        mamba1 = random_mamba1(rng, inner_norms=False)
        return ModelConfig(**common, pattern=f"{rng.randint(1, 4)}*mamba1", mamba1=mamba1)
    if model_type == "nemotron_h":
        kinds = [rng.choice(["mamba2", "attention", "mlp"]) for _ in range(rng.randint(1, 5))]
        return ModelConfig(
            **common,
            pattern=" ".join(kinds),
            mamba2=random_mamba2(rng, d_model, whole_expand=False, upper_limit=False),
            attention=random_attention(rng, d_model, [0.0], bias=False),
            mlp=MLPConfig(d_hidden=20, activation=rng.choice(["relu2", "gelu"]), bias=rng.random() < 0.5),
        )
    if model_type == "jamba":
        attention = dataclasses.replace(random_attention(rng, d_model, [0.0], bias=False), head_dim=None)
        mamba1, mlp = random_mamba1(rng, inner_norms=True), MLPConfig(d_hidden=12, activation="swiglu")
        pattern = rng.choice(["2*(mamba1 mlp)", "mamba1 mlp attention mlp mamba1 mlp"])
        return ModelConfig(**common, pattern=pattern, mamba1=mamba1, attention=attention, mlp=mlp)
    mixers = [rng.choice(["mamba2", "mamba2", "attention"]) for _ in range(rng.randint(1, 3))]
    granite = model_type == "granitemoehybrid"
    attention = random_attention(rng, d_model, [0.0, 1.0] if granite else [0.5, 1.0], bias=True)
    return ModelConfig(
        **common,
        pattern=" ".join(f"{mixer} mlp" for mixer in mixers),
        mamba2=random_mamba2(rng, d_model, whole_expand=True, upper_limit=True),
        attention=dataclasses.replace(attention, softmax_scale=rng.choice([None, 0.2])) if granite else attention,
        mlp=MLPConfig(d_hidden=20, activation="swiglu", bias=not granite and rng.random() < 0.5),
    )


def random_model(config: ModelConfig, seed: int) -> HybridLM:
    """A model in which no parameter has a special value: ones and zeros would hide a mistaken place."""
    model = HybridLM(config)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        model.embed.weight.mul_(25)
    return model.eval()


def stock_of(case: str):
    return next(stock for stock in STOCK_CLASSES if stock.model_type == case.partition(" ")[0])


def write_folder(model: HybridLM, stock, folder: Path, **options) -> None:
    """The export of a model without a run: no tokenizer."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        write_configs(folder, stock, model.config, SPECIAL, context_length=64)
        write_model(folder, stock, model.config, lambda names: {name: state[name] for name in names}, **options)


def train_tokenizer(path: Path, *, vocab_size: int = 400) -> Tokenizer:
    """A small tokenizer with the settings of `headrace prepare`."""
    source = Path(random.__file__).read_text(encoding="utf-8")
    tokenizer = Tokenizer.train(source.split("\n\n"), vocab_size=vocab_size, max_piece_length=16)
    path.write_bytes(tokenizer.model)
    return tokenizer


def write_run(folder: Path, model: HybridLM, tokenizer: Tokenizer, *, step: int = 7) -> Path:
    """A run folder as the trainer leaves it, and its checkpoint."""
    config = Config(
        run=RunConfig(name=folder.name, root=str(folder.parent)),
        model=model.config,
        data=DataConfig(folder="data/none", seq_len=64),
        train=TrainConfig(steps=1000, batch_rows=1),
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    extra = {"data": {"tokenizer_hash": tokenizer.hash}}
    return save_checkpoint(folder / "checkpoints", step, tensors, extra=extra)
