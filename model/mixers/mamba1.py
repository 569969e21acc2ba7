"""Mamba-1 (Gu and Dao 2023, "Mamba", arXiv:2312.00752): projection, convolution, selective scan, gate."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import selective_scan, selective_scan_step, swiglu
from ..init import Constant, LogOfCount, StepSizeBias, Uniform, UniformFanIn
from ..layer import positive
from ..linear import Linear, PartialLinear, joined_linear, joined_partial
from ..norms import RMSNorm
from ..rules import REPLICATED, ParameterRule, ShardRule
from ..sequence import SequenceContext
from .mamba2 import Taps, convolve


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Options of a Mamba-1 layer.

    Args:
        expand: inner channels I as a multiple of d_model.
        d_state: N, numbers of state of a channel.
        d_conv: K, taps of the convolution.
        dt_rank: R, numbers that a token's step sizes are made of; None for d_model / 16, rounded up.
        conv_bias: biases of the convolution.
        bias: biases of the input and output projections.
        inner_norms: RMS norms on dt before its second projection, on B and on C: Jamba (arXiv:2403.19887, section 6.4).
        dt_min, dt_max: the first step sizes lie between these, evenly in their logarithms.
        dt_floor: the least of them.
    """

    expand: float = 2
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | None = None
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def inner(self, d_model: int) -> int:
        """I: channels between the projections."""
        return int(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        """R: `dt_rank`, or a sixteenth of the model's width, rounded up."""
        return -(-d_model // 16) if self.dt_rank is None else self.dt_rank

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        found = positive(self, "d_state", "d_conv", "dt_rank")
        if not 0 < self.dt_min <= self.dt_max:
            found.append(f"dt_min={self.dt_min} must be above 0 and at most dt_max={self.dt_max}; lower it")
        if not self.dt_floor > 0:
            found.append(f"dt_floor={self.dt_floor} must be above 0; use a small number such as 1e-4")
        if not math.isfinite(self.expand):
            found.append(f"expand={self.expand} must be finite; use a number such as 2")
        elif self.inner(d_model) < 1 or self.inner(d_model) != self.expand * d_model:
            found.append(
                f"expand={self.expand} times d_model={d_model} must be a positive whole number of channels; use 2"
            )
        return found

    def num_params(self, d_model: int) -> int:
        """See LayerConfig.num_params."""
        inner, selected = self.inner(d_model), self.rank(d_model) + 2 * self.d_state
        projections = 3 * d_model * inner + (2 * inner + d_model) * self.bias
        selection = inner * (selected + self.rank(d_model)) + selected * self.inner_norms
        ssm = inner * (self.d_state + 2)  # A_log, D and the bias of the step sizes
        return projections + inner * (self.d_conv + self.conv_bias) + selection + ssm

    def num_active_params(self, d_model: int) -> int:
        """See LayerConfig.num_active_params: all."""
        return self.num_params(d_model)

    def flops_per_token(self, d_model: int, L: int) -> int:
        """See LayerConfig.flops_per_token; of the scan, the update of every state and its read-out."""
        inner, R, N = self.inner(d_model), self.rank(d_model), self.d_state
        return 6 * inner * (3 * d_model + 2 * R + 4 * N)

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """See LayerConfig.state_bytes: the scan's state in float32 and d_conv - 1 inputs of the convolution."""
        return self.inner(d_model) * (self.d_state * max(4, element_bytes) + (self.d_conv - 1) * element_bytes)

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> "Mamba1":
        """See LayerConfig.build."""
        return Mamba1(self, d_model, norm_eps, layer_index)


class SelectiveParameters(nn.Module):
    """`A_log` (I, N), `dt_bias` (I,) and `D` (I,): the parameters that must stay float32.

    They have a module, called on its own, so that mixed precision can leave it in float32.
    """

    keep_fp32 = True

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.full((channels, d_state), float("nan")))
        self.dt_bias = nn.Parameter(torch.full((channels,), float("nan")))
        self.D = nn.Parameter(torch.full((channels,), float("nan")))

    def forward(self, dt_BLI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (B, L, I), A (I, N) and D from the projected dt; in the wider of its dtype and the parameters'."""
        # A copy of D: sharded parameters are freed when this forward ends.
        return F.softplus(dt_BLI + self.dt_bias), -self.A_log.exp(), self.D.clone()


class ScanInputs(NamedTuple):
    """What the selective scan of a layer is given; shapes as in `selective_scan`."""

    x_BLI: Tensor
    dt_BLI: Tensor
    A_IN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    D_I: Tensor


def scan(inputs: ScanInputs, past: Tensor | None, seq: SequenceContext, layer: int) -> tuple[Tensor, Tensor | None]:
    """The recurrence of layer number `layer` over tokens that this process holds from first to last."""
    return selective_scan(*inputs, initial_state=past, reset=seq.reset_BL)


class Mamba1(nn.Module):
    """The Mamba-1 mixer. `scan`, `conv`, `project` and `select` are seams: parallelism sets other callables there.

    dt, B and C come from all channels after the convolution: `select` is the seam for those maps, whose inputs are cut
    where channels are and whose outputs every channel needs.
    """

    def __init__(self, config: Mamba1Config, d_model: int, norm_eps: float, layer_index: int) -> None:
        super().__init__()
        inner, R, N = config.inner(d_model), config.rank(d_model), config.d_state
        self.dt_rank, self.d_state, self.layer_index = R, N, layer_index
        self.in_z = Linear(d_model, inner, config.bias)
        self.in_x = Linear(d_model, inner, config.bias)
        self.conv_x = Taps(inner, config.d_conv, config.conv_bias)
        self.x_dt = PartialLinear(inner, R)
        self.x_B = PartialLinear(inner, N)
        self.x_C = PartialLinear(inner, N)
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(width, norm_eps) if config.inner_norms else None for width in (R, N, N)
        )
        self.dt_proj = Linear(R, inner, bias=False)  # its bias is `ssm.dt_bias`
        self.ssm = SelectiveParameters(inner, N)
        self.out_proj = Linear(inner, d_model, config.bias)
        self.parameter_rules = _parameter_rules(config, inner)
        self.scan = scan
        self.conv = convolve
        self.project = joined_linear
        self.select = joined_partial

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Mix along L within documents; reads and replaces the layer's `ssm` and `conv` states when there are any."""
        z_BLI, x_BLI = self.project(x_BLD, ((self.in_z,), (self.in_x,)), seq)
        x_BLI = self._convolve(x_BLI, seq)
        dt_BLR, B_BLN, C_BLN = self._select(x_BLI)
        dt_BLI, A_IN, D_I = self.ssm(self.dt_proj(dt_BLR))
        y_BLI = self._scan(ScanInputs(x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I), seq)
        return self.out_proj(swiglu(z_BLI, y_BLI))

    def _convolve(self, x_BLI: Tensor, seq: SequenceContext) -> Tensor:
        past = None if seq.states is None else seq.states.get(self.layer_index, "conv")
        x_BLI, last = self.conv(x_BLI, self.conv_x.weight, self.conv_x.bias, past, seq, self.layer_index)
        if seq.states is not None and last is not None:
            seq.states.put(self.layer_index, conv=last)
        return x_BLI

    def _select(self, x_BLI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = self.select(x_BLI, (self.x_dt, self.x_B, self.x_C))
        dt_BLR, B_BLN, C_BLN = joined.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.dt_norm is not None and self.B_norm is not None and self.C_norm is not None:
            return self.dt_norm(dt_BLR)[0], self.B_norm(B_BLN)[0], self.C_norm(C_BLN)[0]
        return dt_BLR, B_BLN, C_BLN

    def _scan(self, inputs: ScanInputs, seq: SequenceContext) -> Tensor:
        last: Tensor | None
        past = None if seq.states is None else seq.states.get(self.layer_index, "ssm")
        if past is not None and inputs.x_BLI.shape[1] == 1 and not torch.is_grad_enabled():
            if seq.reset_BL is not None:
                past = past.masked_fill(seq.reset_BL[:, :, None], 0.0)
            x, dt, A_IN, B, C, D_I = inputs
            y_BI, last = selective_scan_step(past, x[:, 0], dt[:, 0], A_IN, B[:, 0], C[:, 0], D_I)
            y_BLI = y_BI[:, None]
        else:
            y_BLI, last = self.scan(inputs, past, seq, self.layer_index)
        if seq.states is not None and last is not None:
            seq.states.put(self.layer_index, ssm=last)
        return y_BLI


def _parameter_rules(config: Mamba1Config, channels: int) -> dict[str, ParameterRule]:
    rows, columns = (ShardRule(dim, "channels", channels) for dim in (0, 1))
    step_sizes = StepSizeBias(config.dt_min, config.dt_max, config.dt_floor)
    rules = {
        "conv_x.weight": ParameterRule(UniformFanIn(), "conv", rows),
        "conv_x.bias": ParameterRule(Uniform(1 / math.sqrt(config.d_conv)), "bias", rows),
        "dt_proj.weight": ParameterRule(UniformFanIn(), "matrix", rows),
        "ssm.A_log": ParameterRule(LogOfCount(), "ssm", rows),
        "ssm.dt_bias": ParameterRule(step_sizes, "ssm", rows),
        "ssm.D": ParameterRule(Constant(1.0), "ssm", rows),
        "out_proj.weight": ParameterRule(UniformFanIn(residual=True), "matrix", columns),
        "out_proj.bias": ParameterRule(Constant(0.0), "bias", REPLICATED),
    }
    for part in ("dt", "B", "C"):
        rules[f"x_{part}.weight"] = ParameterRule(UniformFanIn(), "matrix", columns)
    for part in ("z", "x"):
        rules[f"in_{part}.weight"] = ParameterRule(UniformFanIn(), "matrix", rows)
        rules[f"in_{part}.bias"] = ParameterRule(Constant(0.0), "bias", rows)
    return rules
