"""How the tensors of stock Hugging Face classes are made of ours: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import UserError
from ...model.config import ModelConfig

# Parts of a layer: their tensor in a stock layer, made of ours one under the other along dim 0.
_MAMBA2 = {
    "in_proj.weight": tuple(f"in_{part}.weight" for part in ("z", "x", "B", "C", "dt")),
    "in_proj.bias": tuple(f"in_{part}.bias" for part in ("z", "x", "B", "C", "dt")),
    "conv1d.weight": tuple(f"conv_{part}.weight" for part in ("x", "B", "C")),
    "conv1d.bias": tuple(f"conv_{part}.bias" for part in ("x", "B", "C")),
    "A_log": ("ssm.A_log",),
    "D": ("ssm.D",),
    "dt_bias": ("ssm.dt_bias",),
    "norm.weight": ("norm.weight",),
    "out_proj.weight": ("out_proj.weight",),
    "out_proj.bias": ("out_proj.bias",),
}
_MAMBA1 = {
    "in_proj.weight": ("in_x.weight", "in_z.weight"),
    "in_proj.bias": ("in_x.bias", "in_z.bias"),
    "conv1d.weight": ("conv_x.weight",),
    "conv1d.bias": ("conv_x.bias",),
    "x_proj.weight": ("x_dt.weight", "x_B.weight", "x_C.weight"),
    "dt_proj.weight": ("dt_proj.weight",),
    "dt_proj.bias": ("ssm.dt_bias",),
    "dt_layernorm.weight": ("dt_norm.weight",),
    "b_layernorm.weight": ("B_norm.weight",),
    "c_layernorm.weight": ("C_norm.weight",),
    "A_log": ("ssm.A_log",),
    "D": ("ssm.D",),
    "out_proj.weight": ("out_proj.weight",),
    "out_proj.bias": ("out_proj.bias",),
}
_ATTENTION = {
    f"{stock}.{end}": (f"{ours}.{end}",)
    for stock, ours in {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}.items()
    for end in ("weight", "bias")
}
_MLP = {
    f"{name}.{end}": (f"{name}.{end}",) for name in ("gate_proj", "up_proj", "down_proj") for end in ("weight", "bias")
}
_JOINED_MLP = {
    "input_linear.weight": ("gate_proj.weight", "up_proj.weight"),
    "output_linear.weight": ("down_proj.weight",),
}
# `{expert}` in a name: a tensor for each expert, which is a slice of ours. Published checkpoints have them apart, and
# transformers stacks them when it loads.
_EXPERTS = {f"experts.{{expert}}.{name}.weight": (f"experts.{name}",) for name in ("gate_proj", "up_proj", "down_proj")}
_NEMOTRON_MOE = {
    "gate.weight": ("router.weight",),
    "gate.e_score_correction_bias": ("router.balance_bias",),
    **_EXPERTS,
    "shared_experts.up_proj.weight": ("shared.up_proj.weight",),
    "shared_experts.down_proj.weight": ("shared.down_proj.weight",),
}
_GRANITE_MOE = {
    "block_sparse_moe.router.layer.weight": ("router.weight",),
    "block_sparse_moe.input_linear.weight": ("experts.gate_proj", "experts.up_proj"),
    "block_sparse_moe.output_linear.weight": ("experts.down_proj",),
    "shared_mlp.input_linear.weight": ("shared.gate_proj.weight", "shared.up_proj.weight"),
    "shared_mlp.output_linear.weight": ("shared.down_proj.weight",),
}


@dataclass(frozen=True)
class LayerNames:
    """Where a kind of layer lies in a stock layer: its norm, its module, and the module's tensors made of ours.

    Attributes:
        zeros: tensors that the stock layer has and ours may lack, which are zero then, and their shapes in the letters
            X (experts) and D (model width), or as numbers.
    """

    norm: str
    module: str
    parts: Mapping[str, tuple[str, ...]]
    zeros: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """The tensor names of a stock class, as its published checkpoints spell them.

    Attributes:
        backbone: name of the module that holds embedding, layers and final norm.
        embed, final_norm: modules in the backbone.
        layers: by our kind of layer.
        paired: a stock layer is a mixer and a feed-forward of ours.
        ties: a tied head is left out; a class that cannot tie gets a copy of the embedding.
    """

    backbone: str
    embed: str
    final_norm: str
    layers: Mapping[str, LayerNames]
    paired: bool = False
    ties: bool = True


MAMBA1_NAMES = WeightNames(
    backbone="backbone",
    embed="embeddings",
    final_norm="norm_f",
    layers={"mamba1": LayerNames("norm", "mixer", _MAMBA1)},
)
MAMBA2_NAMES = WeightNames(
    backbone="backbone",
    embed="embeddings",
    final_norm="norm_f",
    layers={"mamba2": LayerNames("norm", "mixer", _MAMBA2)},
)
NEMOTRON_H_NAMES = WeightNames(
    backbone="backbone",
    embed="embeddings",
    final_norm="norm_f",
    layers={
        "mamba2": LayerNames("norm", "mixer", _MAMBA2),
        "attention": LayerNames("norm", "mixer", _ATTENTION),
        "mlp": LayerNames("norm", "mixer", _MLP),
        "moe": LayerNames(
            "norm",
            "mixer",
            _NEMOTRON_MOE,
            # The class takes a shared expert's width of 0 for that of its dense layers: 1 is the least.
            zeros={
                "gate.e_score_correction_bias": ("X",),
                "shared_experts.up_proj.weight": (1, "D"),
                "shared_experts.down_proj.weight": ("D", 1),
            },
        ),
    },
    ties=False,
)
BAMBA_NAMES = WeightNames(
    backbone="model",
    embed="embed_tokens",
    final_norm="final_layernorm",
    layers={
        "mamba2": LayerNames("input_layernorm", "mamba", _MAMBA2),
        "attention": LayerNames("input_layernorm", "self_attn", _ATTENTION),
        "mlp": LayerNames("pre_ff_layernorm", "feed_forward", _MLP),
    },
    paired=True,
)
GRANITE_NAMES = WeightNames(
    backbone="model",
    embed="embed_tokens",
    final_norm="norm",
    layers={
        "mamba2": LayerNames("input_layernorm", "mamba", _MAMBA2),
        "attention": LayerNames("input_layernorm", "self_attn", _ATTENTION),
        "mlp": LayerNames("post_attention_layernorm", "shared_mlp", _JOINED_MLP),
        "moe": LayerNames(
            "post_attention_layernorm",
            "",
            _GRANITE_MOE,
            zeros={"shared_mlp.input_linear.weight": (0, "D"), "shared_mlp.output_linear.weight": ("D", 0)},
        ),
    },
    paired=True,
)
JAMBA_NAMES = WeightNames(
    backbone="model",
    embed="embed_tokens",
    final_norm="final_layernorm",
    layers={
        "mamba1": LayerNames("input_layernorm", "mamba", _MAMBA1),
        "attention": LayerNames("input_layernorm", "self_attn", _ATTENTION),
        "mlp": LayerNames("pre_ff_layernorm", "feed_forward", _MLP),
        "moe": LayerNames("pre_ff_layernorm", "feed_forward", {"router.weight": ("router.weight",), **_EXPERTS}),
    },
    paired=True,
)


@dataclass(frozen=True, kw_only=True)
class Join:
    """A tensor of a stock checkpoint and those of ours it is made of.

    Attributes:
        stock, ours: the names.
        shape: of the stock tensor.
        sizes: what each of ours takes of it along `dim`.
        expert: the one whose slice of ours it is; None for the whole.
        copy: it is written but never read.
    """

    stock: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    dim: int = 0
    expert: int | None = None
    copy: bool = False

    def to_stock(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The stock tensor, contiguous float32; of none of ours, zeros."""
        if not self.ours:
            return torch.zeros(self.shape)
        parts = [weights[name] if self.expert is None else weights[name][self.expert] for name in self.ours]
        return torch.cat(parts, self.dim).float().view(self.shape)

    def from_stock(self, tensor: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Copy the stock tensor into ours, or into the slices that belong to it.

        Raises:
            UserError: the stock tensor has another shape, or is not zero where we have no such parameter.
        """
        if tuple(tensor.shape) != self.shape:
            raise UserError(f"{self.stock} has shape {tuple(tensor.shape)}, its config.json asks for {self.shape}")
        if not self.ours and tensor.any():
            raise UserError(
                f"{self.stock} is not zero, but its config.json has no such part; set n_shared_experts to 1"
            )
        targets = [weights[name] if self.expert is None else weights[name][self.expert] for name in self.ours]
        # Stock convolutions are (D, 1, K), ours (D, K).
        joined = tensor.squeeze(1) if targets and tensor.ndim > targets[0].ndim else tensor
        for target, piece in zip(targets, joined.split(self.sizes, self.dim) if targets else (), strict=True):
            target.copy_(piece)


def _join(stock: str, ours: tuple[str, ...], shapes: Mapping[str, torch.Size], *, apart: bool = False) -> list[Join]:
    """The joins of a stock tensor and of ours: one, or one an expert where they are apart."""
    first = shapes[ours[0]]
    each = tuple(first[1:]) if apart else tuple(first)
    dim = 1 if len(each) == 3 else 0  # stacks of experts are joined expert by expert
    sizes = tuple(shapes[name][dim + apart] for name in ours)
    shape = (*each[:dim], sum(sizes), *each[dim + 1 :])
    if stock.endswith(".conv1d.weight"):
        shape = (shape[0], 1, *shape[1:])
    if not apart:
        return [Join(stock=stock, ours=ours, shape=shape, sizes=sizes, dim=dim)]
    return [
        Join(stock=stock.format(expert=x), ours=ours, shape=shape, sizes=sizes, dim=dim, expert=x)
        for x in range(first[0])
    ]


def joins(names: WeightNames, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> list[Join]:
    """Every tensor of the stock checkpoint of a model whose parameters have `shapes`.

    Raises:
        ValueError: a parameter of ours has no place in the stock class (which the class's problems should have said).
    """
    base = names.backbone
    found = _join(f"{base}.{names.embed}.weight", ("embed.weight",), shapes)
    found += _join(f"{base}.{names.final_norm}.weight", ("norm.weight",), shapes)
    if "lm_head.weight" in shapes:
        found += _join("lm_head.weight", ("lm_head.weight",), shapes)
    elif not names.ties:
        found += [replace(join, copy=True) for join in _join("lm_head.weight", ("embed.weight",), shapes)]
    for index, kind in enumerate(config.kinds):
        stock = f"{base}.layers.{index // 2 if names.paired else index}"
        found += _layer_joins(names.layers[kind], stock, f"layers.{index}", config, shapes)
    placed = {name for join in found if not join.copy for name in join.ours}
    if placed != set(shapes):
        raise ValueError(f"no place in the stock class for {sorted(set(shapes) - placed)[:3]}")
    return found


def _layer_joins(
    place: LayerNames, stock: str, ours: str, config: ModelConfig, shapes: Mapping[str, torch.Size]
) -> list[Join]:
    found = _join(f"{stock}.{place.norm}.weight", (f"{ours}.norm.weight",), shapes)
    module = f"{stock}.{place.module}" if place.module else stock
    letters = {"X": config.moe.num_experts, "D": config.d_model}
    for part, parts in place.parts.items():
        names = tuple(f"{ours}.mixer.{name}" for name in parts)
        # Tables name every tensor a layer may have; biases and gates exist by configuration.
        if names[0] in shapes:
            found += _join(f"{module}.{part}", names, shapes, apart="{expert}" in part)
        elif part in place.zeros:
            shape = tuple(letters[size] if isinstance(size, str) else size for size in place.zeros[part])
            found.append(Join(stock=f"{module}.{part}", ours=(), shape=shape))
    return found
