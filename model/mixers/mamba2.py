"""Mamba-2 (Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060): projection, convolution, SSD, gated norm."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import causal_conv1d, ssd_scan, ssd_step
from ..init import Constant, LogOfUniform, StepSizeBias, Uniform, UniformFanIn
from ..layer import divisors, positive
from ..linear import Linear, joined_linear
from ..norms import GatedRMSNorm
from ..rules import REPLICATED, ParameterRule, ShardRule
from ..sequence import SequenceContext


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Options of a Mamba-2 layer.

    Args:
        num_heads: heads H; None for `expand * d_model / head_dim`. When given, `expand` is not used.
        head_dim: P, channels of a head.
        expand: inner channels as a multiple of d_model.
        d_state: N, numbers of state of a channel.
        num_groups: G, groups of heads that share B and C.
        d_conv: K, taps of the convolution.
        chunk_size: tokens per chunk of the SSD algorithm; speed only, never the result.
        conv_bias: biases of the convolution.
        bias: biases of the input and output projections.
        skip: the `D x` term: one D per head, per channel, or none.
        gated_norm: RMS over each group's channels, over the whole width, or the gate alone.
        norm_before_gate: normalise before multiplying with silu(z) instead of after.
        dt_limit: bounds of the step size after softplus.
        dt_min, dt_max: the first step sizes lie between these, evenly in their logarithms.
        dt_floor: the least of them.
        A_range: the first -A lie between these, evenly.
    """

    num_heads: int | None = None
    head_dim: int = 64
    expand: float = 2
    d_state: int = 128
    num_groups: int = 1
    d_conv: int = 4
    chunk_size: int = 64
    conv_bias: bool = True
    bias: bool = False
    skip: Literal["head", "channel", "none"] = "head"
    gated_norm: Literal["group", "whole", "none"] = "group"
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    A_range: tuple[float, float] = (1.0, 16.0)

    def heads(self, d_model: int) -> int:
        """H: `num_heads`, or as many as fill `expand * d_model` channels."""
        return int(self.expand * d_model) // self.head_dim if self.num_heads is None else self.num_heads

    def _widths(self, d_model: int) -> tuple[int, int, int]:
        """Heads H, inner width H*P, and the G*N channels of B and of C."""
        H = self.heads(d_model)
        return H, H * self.head_dim, self.num_groups * self.d_state

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        found = positive(self, "num_heads", "head_dim", "d_state", "num_groups", "d_conv", "chunk_size")
        for name, known in {"skip": ("head", "channel", "none"), "gated_norm": ("group", "whole", "none")}.items():
            if (value := getattr(self, name)) not in known:
                found.append(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            found.append(f"dt_limit={self.dt_limit} must rise from 0 or above; use (0, inf) for no limit")
        if not 0 < self.A_range[0] <= self.A_range[1] < math.inf:
            found.append(f"A_range={self.A_range} must rise from above 0 and be finite; use numbers such as (1, 16)")
        if not 0 < self.dt_min <= self.dt_max:
            found.append(f"dt_min={self.dt_min} must be above 0 and at most dt_max={self.dt_max}; lower it")
        if not self.dt_floor > 0:
            found.append(f"dt_floor={self.dt_floor} must be above 0; use a small number such as 1e-4")
        if found:
            return found
        if self.num_heads is None and not math.isfinite(self.expand):
            return [f"expand={self.expand} must be finite; use a number such as 2"]
        H, inner = self.heads(d_model), self.expand * d_model
        if self.num_heads is None and (H < 1 or H * self.head_dim != inner):
            found.append(
                f"head_dim={self.head_dim} does not divide expand*d_model={inner:g}; "
                f"use one of {divisors(int(inner)) or 'the divisors of a positive width'}, or set num_heads"
            )
        elif H % self.num_groups:
            found.append(f"num_groups={self.num_groups} does not divide num_heads={H}; use one of {divisors(H)}")
        return found

    def num_params(self, d_model: int) -> int:
        """See LayerConfig.num_params."""
        H, inner, state = self._widths(d_model)
        projected = 2 * inner + 2 * state + H
        conv = (inner + 2 * state) * (self.d_conv + self.conv_bias)
        skip = {"head": H, "channel": inner, "none": 0}[self.skip]
        norm = 0 if self.gated_norm == "none" else inner
        biases = (projected + d_model) * self.bias
        return d_model * (projected + inner) + biases + conv + 2 * H + skip + norm

    def num_active_params(self, d_model: int) -> int:
        """See LayerConfig.num_active_params: all."""
        return self.num_params(d_model)

    def flops_per_token(self, d_model: int, L: int) -> int:
        """See LayerConfig.flops_per_token; the four products of the chunked SSD, within a chunk their causal half."""
        H, inner, state = self._widths(d_model)
        projections = d_model * (3 * inner + 2 * state + H)
        within = min(self.chunk_size, L) * (state + inner) // 2
        across = 2 * inner * self.d_state
        return 6 * (projections + within + across)

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """See LayerConfig.state_bytes: the SSD state in float32 and d_conv - 1 inputs of the convolution."""
        _, inner, state = self._widths(d_model)
        return inner * self.d_state * max(4, element_bytes) + (self.d_conv - 1) * (inner + 2 * state) * element_bytes

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> "Mamba2":
        """See LayerConfig.build."""
        return Mamba2(self, d_model, norm_eps, layer_index)


class Taps(nn.Module):
    """Weights of a depthwise causal convolution: `weight` (D, K), `bias` (D,) or None. The mixer applies them."""

    def __init__(self, channels: int, d_conv: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, d_conv), float("nan")))
        self.bias: nn.Parameter | None = nn.Parameter(torch.full((channels,), float("nan"))) if bias else None


class SSMParameters(nn.Module):
    """`A_log` and `dt_bias`, (H,), and `D`, (H,) or (H, P) or None: the parameters that must stay float32.

    They have a module, called on its own, so that mixed precision can leave it in float32.
    """

    keep_fp32 = True

    def __init__(self, config: Mamba2Config, num_heads: int) -> None:
        super().__init__()
        self.dt_limit = config.dt_limit
        self.A_log = nn.Parameter(torch.full((num_heads,), float("nan")))
        self.dt_bias = nn.Parameter(torch.full((num_heads,), float("nan")))
        shape = {"head": (num_heads,), "channel": (num_heads, config.head_dim)}.get(config.skip)
        self.D: nn.Parameter | None = None if shape is None else nn.Parameter(torch.full(shape, float("nan")))

    def forward(self, dt_BLH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Step sizes (B, L, H), A (H,) and D from the projected dt; in the wider of its dtype and the parameters'."""
        dt_BLH = F.softplus(dt_BLH + self.dt_bias)
        low, high = self.dt_limit
        if low > 0 or high < math.inf:
            dt_BLH = dt_BLH.clamp(low, high)
        # A copy of D: sharded parameters are freed when this forward ends.
        return dt_BLH, -self.A_log.exp(), None if self.D is None else self.D.clone()


class ScanInputs(NamedTuple):
    """What the SSD recurrence of a layer is given; shapes as in `ssd_scan`."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor
    D: Tensor | None


def convolve(
    x_BLF: Tensor, weight_FK: Tensor, bias_F: Tensor | None, past: Tensor | None, seq: SequenceContext, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The convolution of layer number `layer` over tokens that this process holds from first to last."""
    return causal_conv1d(x_BLF, weight_FK, bias_F, activation="silu", initial_state=past, reset=seq.reset_BL)


def scan(
    inputs: ScanInputs, chunk_size: int, past: Tensor | None, seq: SequenceContext, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of layer number `layer` over tokens that this process holds from first to last."""
    return ssd_scan(*inputs, chunk_size=chunk_size, initial_state=past, reset=seq.reset_BL)


class Mamba2(nn.Module):
    """The Mamba-2 mixer. `scan`, `conv` and `project` are seams: parallelism sets other callables there."""

    def __init__(self, config: Mamba2Config, d_model: int, norm_eps: float, layer_index: int) -> None:
        super().__init__()
        self.head_dim, self.d_state, self.chunk_size = config.head_dim, config.d_state, config.chunk_size
        self.layer_index = layer_index
        H = config.heads(d_model)
        inner, state = H * config.head_dim, config.num_groups * config.d_state
        self.in_z = Linear(d_model, inner, config.bias)
        self.in_x = Linear(d_model, inner, config.bias)
        self.in_B = Linear(d_model, state, config.bias)
        self.in_C = Linear(d_model, state, config.bias)
        self.in_dt = Linear(d_model, H, config.bias)
        self.conv_x = Taps(inner, config.d_conv, config.conv_bias)
        self.conv_B = Taps(state, config.d_conv, config.conv_bias)
        self.conv_C = Taps(state, config.d_conv, config.conv_bias)
        self.ssm = SSMParameters(config, H)
        self.norm: GatedRMSNorm | None = None
        if config.gated_norm != "none":
            group_size = inner // config.num_groups if config.gated_norm == "group" else inner
            self.norm = GatedRMSNorm(inner, norm_eps, group_size=group_size, norm_before_gate=config.norm_before_gate)
        self.out_proj = Linear(inner, d_model, config.bias)
        self.parameter_rules = _parameter_rules(config, H)
        self.scan = scan
        self.conv = convolve
        self.project = joined_linear

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Mix along L within documents; reads and replaces the layer's `ssd` and `conv` states when there are any."""
        groups = ((self.in_z,), (self.in_x, self.in_B, self.in_C), (self.in_dt,))
        z_BLI, xBC_BLF, dt_BLH = self.project(x_BLD, groups, seq)
        dt_BLH, A_H, D = self.ssm(dt_BLH)
        x_BLHP, B_BLGN, C_BLGN = self._convolve(xBC_BLF, seq)
        y_BLHP = self._scan(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, seq)
        y_BLI = y_BLHP.flatten(2)
        y_BLI = y_BLI * F.silu(z_BLI) if self.norm is None else self.norm(y_BLI, z_BLI)
        return self.out_proj(y_BLI)

    def _convolve(self, xBC_BLF: Tensor, seq: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        taps = (self.conv_x, self.conv_B, self.conv_C)
        weight_FK = torch.cat([tap.weight for tap in taps])
        biases: list[Tensor] = [tap.bias for tap in taps if tap.bias is not None]
        past = None if seq.states is None else seq.states.get(self.layer_index, "conv")
        bias_F = torch.cat(biases) if biases else None
        out_BLF, last = self.conv(xBC_BLF, weight_FK, bias_F, past, seq, self.layer_index)
        if seq.states is not None and last is not None:
            seq.states.put(self.layer_index, conv=last)
        x_BLI, B_BLS, C_BLS = out_BLF.split([tap.weight.shape[0] for tap in taps], dim=-1)
        return (
            x_BLI.unflatten(-1, (-1, self.head_dim)),
            B_BLS.unflatten(-1, (-1, self.d_state)),
            C_BLS.unflatten(-1, (-1, self.d_state)),
        )

    def _scan(
        self,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D: Tensor | None,
        seq: SequenceContext,
    ) -> Tensor:
        last: Tensor | None
        past = None if seq.states is None else seq.states.get(self.layer_index, "ssd")
        if past is not None and x_BLHP.shape[1] == 1 and not torch.is_grad_enabled():
            if seq.reset_BL is not None:
                past = past.masked_fill(seq.reset_BL[:, :, None, None], 0.0)
            y_BHP, last = ssd_step(past, x_BLHP[:, 0], dt_BLH[:, 0], A_H, B_BLGN[:, 0], C_BLGN[:, 0], D)
            y_BLHP = y_BHP[:, None]
        else:
            inputs = ScanInputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D)
            y_BLHP, last = self.scan(inputs, self.chunk_size, past, seq, self.layer_index)
        if seq.states is not None and last is not None:
            seq.states.put(self.layer_index, ssd=last)
        return y_BLHP


def _parameter_rules(config: Mamba2Config, num_heads: int) -> dict[str, ParameterRule]:
    heads = ShardRule(0, "heads", num_heads)
    groups = ShardRule(0, "groups", config.num_groups, num_heads)
    rules = {
        "ssm.A_log": ParameterRule(LogOfUniform(*config.A_range), "ssm", heads),
        "ssm.dt_bias": ParameterRule(StepSizeBias(config.dt_min, config.dt_max, config.dt_floor), "ssm", heads),
        "ssm.D": ParameterRule(Constant(1.0), "ssm", heads),
        "norm.weight": ParameterRule(Constant(1.0), "norm", heads),
        "out_proj.weight": ParameterRule(UniformFanIn(residual=True), "matrix", ShardRule(1, "heads", num_heads)),
        "out_proj.bias": ParameterRule(Constant(0.0), "bias", REPLICATED),
    }
    for part, unit in {"z": heads, "x": heads, "B": groups, "C": groups, "dt": heads}.items():
        rules[f"in_{part}.weight"] = ParameterRule(UniformFanIn(), "matrix", unit)
        rules[f"in_{part}.bias"] = ParameterRule(Constant(0.0), "bias", unit)
        rules[f"conv_{part}.weight"] = ParameterRule(UniformFanIn(), "conv", unit)
        rules[f"conv_{part}.bias"] = ParameterRule(Uniform(1 / math.sqrt(config.d_conv)), "bias", unit)
    return rules
