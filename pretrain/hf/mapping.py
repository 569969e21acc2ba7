"""How the tensors of stock Hugging Face classes are made of ours: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class LayerNames:
    """Where a kind of layer lies in a stock layer: its norm, its module, and the module's tensors made of ours."""

    norm: str
    module: str
    parts: Mapping[str, tuple[str, ...]]


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
    },
    paired=True,
)


@dataclass(frozen=True)
class Join:
    """A tensor of a stock checkpoint and those of ours it is made of; a `copy` is written but never read."""

    stock: str
    ours: tuple[str, ...]
    copy: bool = False

    @property
    def is_conv(self) -> bool:
        """Stock convolutions are (D, 1, K), ours (D, K)."""
        return self.stock.endswith(".conv1d.weight")

    def to_stock(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The stock tensor, contiguous float32."""
        tensor = torch.cat([weights[name] for name in self.ours]).float()
        return tensor.unsqueeze(1) if self.is_conv else tensor

    def stock_shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Shape of the stock tensor, from the shapes of ours."""
        first = shapes[self.ours[0]]
        rows = sum(shapes[name][0] for name in self.ours)
        return (rows, 1, *first[1:]) if self.is_conv else (rows, *first[1:])

    def from_stock(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our tensors out of the stock one, float32 and contiguous.

        Raises:
            UserError: the stock tensor has another shape.
        """
        if tuple(tensor.shape) != self.stock_shape(shapes):
            raise UserError(
                f"{self.stock} has shape {tuple(tensor.shape)}, its config.json asks for {self.stock_shape(shapes)}"
            )
        tensor = tensor.squeeze(1) if self.is_conv else tensor
        pieces = tensor.float().split([shapes[name][0] for name in self.ours])
        return {name: piece.clone() for name, piece in zip(self.ours, pieces, strict=True)}


def joins(names: WeightNames, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> list[Join]:
    """Every tensor of the stock checkpoint of a model whose parameters have `shapes`.

    Raises:
        ValueError: a parameter of ours has no place in the stock class (which the class's problems should have said).
    """
    base = names.backbone
    found = [
        Join(f"{base}.{names.embed}.weight", ("embed.weight",)),
        Join(f"{base}.{names.final_norm}.weight", ("norm.weight",)),
        Join("lm_head.weight", ("lm_head.weight",)),
    ]
    if config.tie_embeddings and not names.ties:
        found.append(Join("lm_head.weight", ("embed.weight",), copy=True))
    for index, kind in enumerate(config.kinds):
        place = names.layers[kind]
        stock = f"{base}.layers.{index // 2 if names.paired else index}"
        found.append(Join(f"{stock}.{place.norm}.weight", (f"layers.{index}.norm.weight",)))
        found += [
            Join(f"{stock}.{place.module}.{part}", tuple(f"layers.{index}.mixer.{name}" for name in ours))
            for part, ours in place.parts.items()
        ]
    # Tables name every tensor a layer may have; biases, gates and an untied head exist by configuration.
    found = [join for join in found if join.ours[0] in shapes]
    placed = [name for join in found if not join.copy for name in join.ours]
    if sorted(placed) != sorted(shapes):
        raise ValueError(f"no place in the stock class for {sorted(set(shapes) - set(placed))[:3]}")
    return found
