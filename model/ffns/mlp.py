"""Feed-forward layers: SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021), GELU (Hendrycks and Gimpel 2016)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import swiglu
from ..init import Constant, UniformFanIn
from ..layer import positive
from ..linear import Linear, joined_linear
from ..rules import REPLICATED, ParameterRule, ShardRule
from ..sequence import SequenceContext

ACTIVATIONS = ("swiglu", "relu2", "gelu")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of a feed-forward layer.

    Args:
        d_hidden: hidden width; None for 4 * d_model, or with SwiGLU 8/3 * d_model rounded up to a multiple of 64.
        activation: `swiglu` (a gate matrix beside the first), `relu2` or `gelu`.
        bias: biases on all projections.
    """

    d_hidden: int | None = None
    activation: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    bias: bool = False

    def hidden(self, d_model: int) -> int:
        """Hidden width."""
        if self.d_hidden is not None:
            return self.d_hidden
        return -(-8 * d_model // 192) * 64 if self.activation == "swiglu" else 4 * d_model

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        found = positive(self, "d_hidden")
        if self.activation not in ACTIVATIONS:
            found.append(f"activation={self.activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        return found

    def _first_width(self, d_model: int) -> int:
        return self.hidden(d_model) * (2 if self.activation == "swiglu" else 1)

    def num_params(self, d_model: int) -> int:
        """See LayerConfig.num_params."""
        first, hidden = self._first_width(d_model), self.hidden(d_model)
        return d_model * (first + hidden) + (first + d_model) * self.bias

    def num_active_params(self, d_model: int) -> int:
        """See LayerConfig.num_active_params: all."""
        return self.num_params(d_model)

    def flops_per_token(self, d_model: int, L: int) -> int:
        """See LayerConfig.flops_per_token."""
        return 6 * d_model * (self._first_width(d_model) + self.hidden(d_model))

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """See LayerConfig.state_bytes: none."""
        return 0

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> "MLP":
        """See LayerConfig.build."""
        return MLP(self, d_model)


class MLP(nn.Module):
    """The feed-forward layer. `project` is a seam: parallelism sets another callable there."""

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        hidden = config.hidden(d_model)
        self.activation = config.activation
        self.gate_proj = Linear(d_model, hidden, config.bias) if config.activation == "swiglu" else None
        self.up_proj = Linear(d_model, hidden, config.bias)
        self.down_proj = Linear(hidden, d_model, config.bias)
        columns = ShardRule(0, "hidden", hidden)
        self.parameter_rules = {
            "down_proj.weight": ParameterRule(UniformFanIn(residual=True), "matrix", ShardRule(1, "hidden", hidden)),
            "down_proj.bias": ParameterRule(Constant(0.0), "bias", REPLICATED),
        }
        for name in ("gate_proj", "up_proj"):
            self.parameter_rules[f"{name}.weight"] = ParameterRule(UniformFanIn(), "matrix", columns)
            self.parameter_rules[f"{name}.bias"] = ParameterRule(Constant(0.0), "bias", columns)
        self.project = joined_linear

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Map each token on its own; `seq` is not used."""
        if self.gate_proj is not None:
            gate, up = self.project(x_BLD, ((self.gate_proj,), (self.up_proj,)), seq)
            return self.down_proj(swiglu(gate, up))
        (up,) = self.project(x_BLD, ((self.up_proj,),), seq)
        return self.down_proj(F.relu(up).square() if self.activation == "relu2" else F.gelu(up))
