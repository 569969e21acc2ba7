"""Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023), over everything or over a window."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..init import Constant, UniformFanIn
from ..layer import divisors, positive
from ..linear import Linear, joined_linear
from ..rules import REPLICATED, ParameterRule, ShardRule
from ..sequence import SequenceContext

# On a CPU: queries of a block, and the probabilities a layer may keep for its backward pass (256 MiB in float32).
BLOCK_QUERIES, MOST_PROBABILITIES = 128, 1 << 26


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of an attention layer.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads; None for as many.
        head_dim: width of a head; None for `d_model / num_heads`.
        rope_fraction: share of each head's width that is rotated by position (Su et al. 2021): 0 none, 1 all.
        rope_theta: base of the rotary frequencies.
        bias: biases on all four projections.
        softmax_scale: factor on the scores; None for `head_dim ** -0.5`.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_fraction: float = 0.0
    rope_theta: float = 10000.0
    bias: bool = False
    softmax_scale: float | None = None

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def span(self) -> int | None:
        """How many tokens a token sees, itself included; None for all before it."""
        return None

    def width(self, d_model: int) -> int:
        """Width of a head."""
        return d_model // self.num_heads if self.head_dim is None else self.head_dim

    def rope_dims(self, d_model: int) -> int:
        """How many of a head's channels are rotated."""
        return int(self.width(d_model) * self.rope_fraction)

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        found = positive(self, "num_heads", "num_kv_heads", "head_dim")
        if not 0 <= self.rope_fraction <= 1:
            found.append(f"rope_fraction={self.rope_fraction} must lie in [0, 1]; use 0 for no rotary positions")
        if not (0 < self.rope_theta < math.inf):
            found.append(f"rope_theta={self.rope_theta} must be positive; use a number such as 10000")
        if self.softmax_scale is not None and not (0 < self.softmax_scale < math.inf):
            found.append(f"softmax_scale={self.softmax_scale} must be positive; leave it out for head_dim ** -0.5")
        if found:
            return found
        if self.num_heads % self.kv_heads:
            found.append(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; "
                f"use one of {divisors(self.num_heads)}"
            )
        if self.head_dim is None and d_model % self.num_heads:
            found.append(
                f"num_heads={self.num_heads} does not divide d_model={d_model}; "
                f"use one of {divisors(d_model)}, or set head_dim"
            )
        elif self.rope_dims(d_model) % 2 or (self.rope_fraction and not self.rope_dims(d_model)):
            found.append(
                f"rope_fraction={self.rope_fraction} of head_dim={self.width(d_model)} is not an even number of "
                "channels; use a share that is, such as 0, 0.5 or 1"
            )
        return found

    def num_params(self, d_model: int) -> int:
        """See LayerConfig.num_params."""
        queries, keys = self.num_heads * self.width(d_model), self.kv_heads * self.width(d_model)
        return d_model * (2 * queries + 2 * keys) + (queries + 2 * keys + d_model) * self.bias

    def num_active_params(self, d_model: int) -> int:
        """See LayerConfig.num_active_params: all."""
        return self.num_params(d_model)

    def flops_per_token(self, d_model: int, L: int) -> int:
        """See LayerConfig.flops_per_token; scores and mixing count the keys a token sees, on average over the row."""
        queries, keys = self.num_heads * self.width(d_model), self.kv_heads * self.width(d_model)
        span = min(self.span or L, L)
        seen_by_all = span * (span + 1) // 2 + (L - span) * span
        return 6 * (d_model * (2 * queries + 2 * keys) + 2 * queries * seen_by_all // L)

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """See LayerConfig.state_bytes: keys and values of the tokens that a next one can see."""
        kept = L if self.span is None else min(L, self.span - 1)
        return 2 * kept * self.kv_heads * self.width(d_model) * element_bytes

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> "Attention":
        """See LayerConfig.build."""
        return Attention(self, d_model, layer_index)


@dataclass(frozen=True, kw_only=True)
class SlidingAttentionConfig(AttentionConfig):
    """Options of attention over a sliding window.

    Args:
        window: tokens that a token sees, itself included.
    """

    window: int = 512

    @property
    def span(self) -> int | None:
        """The window."""
        return self.window

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        return positive(self, "window") + super().problems(d_model)


class Attention(nn.Module):
    """The attention mixer. `attend` and `project` are seams: parallelism sets other callables there."""

    def __init__(self, config: AttentionConfig, d_model: int, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.width(d_model)
        self.rope_dims, self.rope_theta = config.rope_dims(d_model), config.rope_theta
        self.window = config.span
        self.scale = self.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        queries, keys = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = Linear(d_model, queries, config.bias)
        self.k_proj = Linear(d_model, keys, config.bias)
        self.v_proj = Linear(d_model, keys, config.bias)
        self.out_proj = Linear(queries, d_model, config.bias)
        heads = ShardRule(0, "heads", config.num_heads)
        kv_heads = ShardRule(0, "kv_heads", config.kv_heads, config.num_heads)
        self.parameter_rules = {
            "out_proj.weight": ParameterRule(
                UniformFanIn(residual=True), "matrix", ShardRule(1, "heads", config.num_heads)
            ),
            "out_proj.bias": ParameterRule(Constant(0.0), "bias", REPLICATED),
        }
        for name, unit in {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.items():
            self.parameter_rules[f"{name}.weight"] = ParameterRule(UniformFanIn(), "matrix", unit)
            self.parameter_rules[f"{name}.bias"] = ParameterRule(Constant(0.0), "bias", unit)
        self.attend = attend
        self.project = joined_linear

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Attend within documents; reads and extends the layer's `keys` and `values` when there are states."""
        projected = self.project(x_BLD, ((self.q_proj,), (self.k_proj,), (self.v_proj,)), seq)
        B, L, _ = projected[0].shape
        q, k, v = (part.view(B, L, -1, self.head_dim).transpose(1, 2) for part in projected)
        if self.rope_dims:
            cos, sin = rotary_tables(seq, L, self.rope_dims, self.rope_theta, x_BLD)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if seq.states is not None:
            k, v = self._extend_cache(k, v, seq)
        y_BHLP = self.attend(q, k, v, seq, window=self.window, scale=self.scale)
        return self.out_proj(y_BHLP.transpose(1, 2).reshape(B, L, -1))

    def _extend_cache(self, k: Tensor, v: Tensor, seq: SequenceContext) -> tuple[Tensor, Tensor]:
        assert seq.states is not None
        past_k, past_v = (seq.states.get(self.layer_index, name) for name in ("keys", "values"))
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        first = 0 if self.window is None else max(0, k.shape[2] - (self.window - 1))
        # Cloned where cut: a view would hold on to every key there ever was.
        kept = (k, v) if first == 0 else (k[:, :, first:].clone(), v[:, :, first:].clone())
        seq.states.put(self.layer_index, keys=kept[0], values=kept[1])
        return k, v


def rotary_tables(seq: SequenceContext, L: int, dims: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, L, dims/2) of the tokens' positions in their documents, in `like`'s dtype."""

    def make() -> tuple[Tensor, Tensor]:
        # In float64: at a million tokens, float32 angles are wrong by several hundredths.
        exponent = torch.arange(0, dims, 2, device=like.device, dtype=torch.float64) / dims
        angle = seq.position_BL(L, like.device)[:, None, :, None] / theta**exponent
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    return seq.shared(("rotary", L, dims, theta, like.dtype), make)


def rotate(x_BHLP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first channels of each head, pairing channel i with i + dims/2 ("rotate half")."""
    half = cos.shape[-1]
    first, second, rest = x_BHLP.split([half, half, x_BHLP.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(
    q_BHLP: Tensor, k_BJSP: Tensor, v_BJSP: Tensor, seq: SequenceContext, *, window: int | None, scale: float
) -> Tensor:
    """Softmax attention of L queries over S >= L keys, of which the last L belong to the queries' own tokens.

    A query sees the keys of its document that are not after it and less than `window` tokens before it.
    """
    L, S = q_BHLP.shape[2], k_BJSP.shape[2]
    in_blocks = _blocks_are_faster(q_BHLP, S)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q_BHLP.shape[1] != k_BJSP.shape[1]}
    if seq.one_document and S == L and (window is None or window >= L) and not in_blocks:
        return F.scaled_dot_product_attention(q_BHLP, k_BJSP, v_BJSP, is_causal=True, **options)
    if q_BHLP.is_cuda and seq.states is None:
        position_BL = seq.position_BL(L, q_BHLP.device)
        block_mask = seq.shared(("blocks", S, window), lambda: _block_mask(position_BL, S, window))
        return _flex_attention()(q_BHLP, k_BJSP, v_BJSP, block_mask=block_mask, **options)
    position_BL = seq.position_BL(L, q_BHLP.device)
    mask = seq.shared(("mask", L, S, window, q_BHLP.dtype), lambda: _mask(position_BL, S, window, q_BHLP.dtype))
    if in_blocks:
        return _attend_in_blocks(q_BHLP, k_BJSP, v_BJSP, mask, scale)
    return F.scaled_dot_product_attention(q_BHLP, k_BJSP, v_BJSP, attn_mask=mask, **options)


def _blocks_are_faster(q_BHLP: Tensor, S: int) -> bool:
    """Whether products over blocks, whose probabilities autograd keeps, beat SDPA: on a CPU, where they fit."""
    B, H, L, _ = q_BHLP.shape
    wide = q_BHLP.dtype in (torch.float32, torch.float64)
    return q_BHLP.device.type == "cpu" and wide and L > 1 and B * H * L * S <= MOST_PROBABILITIES


def _attend_in_blocks(q_BHLP: Tensor, k_BJSP: Tensor, v_BJSP: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention a block of queries at a time, without the keys after it; heads that share keys are joined."""
    L, S = mask.shape[2:]
    q_BJhLP = (q_BHLP * scale).unflatten(1, (k_BJSP.shape[1], -1))
    blocks = []
    for start in range(0, L, BLOCK_QUERIES):
        block = slice(start, min(start + BLOCK_QUERIES, L))
        seen = slice(S - L + block.stop)
        q_BJhrP = q_BJhLP[:, :, :, block]
        scores = q_BJhrP.flatten(2, 3) @ k_BJSP[:, :, seen].mT
        scores = scores.unflatten(2, q_BJhrP.shape[2:4]) + mask[:, :, None, block, seen]
        blocks.append((scores.softmax(-1).flatten(2, 3) @ v_BJSP[:, :, seen]).view_as(q_BJhrP))
    return torch.cat(blocks, 3).flatten(1, 2)


def _mask(position_BL: Tensor, S: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of L queries and S keys: 0 where a query sees a key; (B or 1, 1, L, S)."""
    L = position_BL.shape[1]
    query_L = torch.arange(S - L, S, device=position_BL.device)
    distance_LS = query_L[:, None] - torch.arange(S, device=position_BL.device)
    reach_BL = position_BL if window is None else position_BL.clamp(max=window - 1)
    hidden_BLS = (distance_LS < 0) | (distance_LS > reach_BL[:, :, None])
    mask_BLS = torch.zeros(hidden_BLS.shape, dtype=dtype, device=hidden_BLS.device)
    return mask_BLS.masked_fill_(hidden_BLS, -math.inf)[:, None]


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(position_BL: Tensor, S: int, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, L = position_BL.shape
    reach_BL = position_BL if window is None else position_BL.clamp(max=window - 1)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + (S - L) - key
        return (distance >= 0) & (distance <= reach_BL[b, query])

    return create_block_mask(visible, rows if rows > 1 else None, None, L, S, device=str(position_BL.device))
