"""Mixture of experts: each token goes through a few of many feed-forward networks (Shazeer et al. 2017).

No token is dropped: experts take as many as come. Which ones a token goes to is decided in `routing.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import expert_order, grouped_linear, permute, swiglu, unpermute
from ..init import Constant, UniformFanIn
from ..layer import divisors, positive
from ..rules import REPLICATED, ParameterRule, ShardRule
from ..sequence import SequenceContext
from .mlp import ACTIVATIONS, MLP, MLPConfig
from .routing import Router, RouterConfig

CHOICES = {
    "activation": ACTIVATIONS,
    "score": ("softmax", "sigmoid"),
    "balance": ("loss", "bias", "sinkhorn", "none"),
    "balance_scope": ("row", "batch"),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RouterConfig):
    """Options of a mixture-of-experts layer; `routing.py` lists the settings of published models.

    Args:
        d_hidden: hidden width of one expert; None for that of a dense layer.
        activation: as in MLPConfig, for experts and the shared expert.
        d_shared: hidden width of a shared expert that all tokens go through; 0 for none.
    """

    d_hidden: int | None = None
    activation: Literal["swiglu", "relu2", "gelu"] = "swiglu"
    d_shared: int = 0

    def hidden(self, d_model: int) -> int:
        """Hidden width of one expert."""
        return MLPConfig(d_hidden=self.d_hidden, activation=self.activation).hidden(d_model)

    def problems(self, d_model: int) -> list[str]:
        """See LayerConfig.problems."""
        found = positive(self, "num_experts", "top_k", "d_hidden", "num_groups", "top_groups", "sinkhorn_iterations")
        found += positive(self, "chunk")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                found.append(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
        found += [
            f"{name}={getattr(self, name)} must not be negative; use 0 or more"
            for name in ("d_shared", "balance_loss", "bias_rate", "z_loss")
            if not getattr(self, name) >= 0
        ]
        if not 0 <= self.jitter < 1:
            found.append(f"jitter={self.jitter} must lie between 0 and 1; use 0 for none")
        if not self.scale > 0:
            found.append(f"scale={self.scale} must be above 0; use 1 for none")
        return found or self._misfits()

    def _misfits(self) -> list[str]:
        """Numbers that are fine alone and do not fit each other."""
        experts, groups = self.num_experts, self.num_groups
        if experts % groups:
            return [f"num_groups={groups} does not divide num_experts={experts}; use one of {divisors(experts)}"]
        if self.top_groups > groups:
            return [f"top_groups={self.top_groups} is above num_groups={groups}; lower it"]
        if self.top_k > (offered := experts // groups * self.top_groups):
            of = f"num_experts={experts}" if groups == 1 else f"the {offered} experts of top_groups={self.top_groups}"
            return [f"top_k={self.top_k} is above {of}; lower it"]
        return []

    def num_params(self, d_model: int) -> int:
        """See LayerConfig.num_params."""
        return self._params(d_model, self.num_experts)

    def num_active_params(self, d_model: int) -> int:
        """Parameters that one token meets."""
        return self._params(d_model, self.top_k)

    def _params(self, d_model: int, experts: int) -> int:
        router = self.num_experts * (d_model + (self.balance == "bias"))
        return router + self._matrices() * d_model * (experts * self.hidden(d_model) + self.d_shared)

    def _matrices(self) -> int:
        return 3 if self.activation == "swiglu" else 2

    def flops_per_token(self, d_model: int, L: int) -> int:
        """See LayerConfig.flops_per_token; the router counts."""
        hidden = self.top_k * self.hidden(d_model) + self.d_shared
        return 6 * d_model * (self._matrices() * hidden + self.num_experts)

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """See LayerConfig.state_bytes: logits of the tokens whose chunk may go on."""
        return (self.chunk - 1) * self.num_experts * max(4, element_bytes)

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> "MoE":
        """See LayerConfig.build."""
        return MoE(self, d_model, layer_index)


class Experts(nn.Module):
    """The feed-forward networks of a layer, each matrix of theirs one stack: `(X, F, D)`, the last `(X, D, F)`."""

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        X, hidden = config.num_experts, config.hidden(d_model)
        self.num_experts, self.activation = X, config.activation
        first = torch.full((X, hidden, d_model), float("nan"))
        self.gate_proj = nn.Parameter(first.clone()) if config.activation == "swiglu" else None
        self.up_proj = nn.Parameter(first)
        self.down_proj = nn.Parameter(torch.full((X, d_model, hidden), float("nan")))

    def forward(self, x_SD: Tensor, ends_X: Tensor) -> Tensor:
        """The outputs of rows sorted by expert; expert x has those from `ends[x - 1]` to `ends[x]`."""
        up_SF = grouped_linear(x_SD, self.up_proj, ends_X)
        if self.gate_proj is not None:
            hidden_SF = swiglu(grouped_linear(x_SD, self.gate_proj, ends_X), up_SF)
        else:
            hidden_SF = F.relu(up_SF).square() if self.activation == "relu2" else F.gelu(up_SF)
        return grouped_linear(hidden_SF, self.down_proj, ends_X)


def dispatch(
    experts: Experts,
    x_TD: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    seq: SequenceContext,
    meanwhile: Callable[[], Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Take each token to its experts and sum their outputs by weight; and the result of `meanwhile`.

    `meanwhile` is work that needs none of this: where tokens travel, it is done while they do.
    """
    place_Tk, ends_X = expert_order(experts_Tk, experts.num_experts)
    out_SD = experts(permute(x_TD, place_Tk, experts_Tk.numel()), ends_X)
    return unpermute(out_SD, weights_Tk, place_Tk), meanwhile()


class MoE(nn.Module):
    """The mixture-of-experts layer. `dispatch` is a seam: parallelism sets another callable there."""

    def __init__(self, config: MoEConfig, d_model: int, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, d_model, layer_index)
        self.experts = Experts(config, d_model)
        self.shared: MLP | None = None
        if config.d_shared:
            self.shared = MLP(MLPConfig(d_hidden=config.d_shared, activation=config.activation), d_model)
        X, hidden = config.num_experts, config.hidden(d_model)
        first = ParameterRule(UniformFanIn(stack=True), "experts", ShardRule(1, "hidden", hidden, experts=X))
        last_cut = ShardRule(2, "hidden", hidden, experts=X)
        self.parameter_rules = {
            "router.weight": ParameterRule(UniformFanIn(), "router", REPLICATED),
            "router.balance_bias": ParameterRule(Constant(0.0), "balance", REPLICATED),
            "experts.gate_proj": first,
            "experts.up_proj": first,
            "experts.down_proj": ParameterRule(UniformFanIn(residual=True, stack=True), "experts", last_cut),
        }
        self.dispatch = dispatch

    def forward(self, x_BLD: Tensor, seq: SequenceContext) -> Tensor:
        """Map each token by its experts' weighted sum and, where there is one, the shared expert."""
        x_TD = x_BLD.flatten(0, 1)
        experts_Tk, weights_Tk = self.router(x_TD, seq)
        shared = self.shared
        meanwhile = lambda: None if shared is None else shared(x_BLD, seq)
        out_TD, shared_BLD = self.dispatch(self.experts, x_TD, experts_Tk, weights_Tk, seq, meanwhile)
        out_BLD = out_TD.view(x_BLD.shape)
        return out_BLD if shared_BLD is None else out_BLD + shared_BLD
