"""The health of routing: what mixture-of-experts layers tell of every pass, added up, acted on and reported."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..model.config import ModelConfig
from ..model.ffns.moe import MoE
from ..model.ffns.routing import TOLD, move_bias
from ..model.lm import HybridLM
from ..parallel.comm import largest_over_ranks, sum_over_ranks
from ..parallel.fsdp import fill

# Reports in a row without a single token after which an expert counts as dead.
SILENT_REPORTS = 3


class RoutingTally:
    """Adds up what routers tell: of each layer, how many tokens each expert got, and the sums named in `TOLD`.

    The same on every rank once it is summed; pipeline stages fill in their own layers. Without such layers it does
    nothing, and no collective.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.layers = [number for number, kind in enumerate(config.kinds) if kind == "moe"]
        self.config = config.moe
        shape = len(self.layers), config.moe.num_experts + len(TOLD)
        self._step = torch.zeros(shape, dtype=torch.float64, device=device)
        self._since_report = torch.zeros_like(self._step)
        self._silent_reports = torch.zeros(len(self.layers), config.moe.num_experts, dtype=torch.int64)

    def forget(self) -> None:
        """Nothing has been told yet: the run goes back to a checkpoint."""
        for tensor in (self._step, self._since_report, self._silent_reports):
            tensor.zero_()

    def add(self, told: dict[int, Tensor]) -> None:
        """Add what the routers of one pass told, by layer."""
        for layer, numbers in told.items():
            self._step[self.layers.index(layer)] += numbers

    def finish_step(self, models: list[HybridLM], skip: Tensor) -> None:
        """Count the step, and move balance biases by its load unless `skip` is 1. Collective where there are such."""
        if not self.layers:
            return
        moves = self.config.balance == "bias"
        if moves:
            sum_over_ranks(self._step)
            for layer, router in _routers(models):
                bias_X = router.balance_bias
                assert bias_X is not None
                load_X = self._step[self.layers.index(layer), : self.config.num_experts]
                fill(bias_X, move_bias(_whole(bias_X), load_X, self.config.bias_rate, skip))
        self._since_report += self._step
        self._step.zero_()

    def report(self, models: list[HybridLM]) -> "RoutingReport | None":
        """What happened since the last report, None without such layers. Collective.

        Raises:
            UserError: a router's logits were not finite; names the layers.
        """
        if not self.layers:
            return None
        if self.config.balance != "bias":  # else summed in every step
            sum_over_ranks(self._since_report)
        experts = self.config.num_experts
        found, biases = self._since_report.to("cpu", copy=True), self._biases(models)
        self._since_report.zero_()
        load, rest = found[:, :experts], dict(zip(TOLD, found[:, experts:].T, strict=True))
        if broken := [str(layer) for layer, count in zip(self.layers, rest["nonfinite"], strict=True) if count]:
            raise UserError(
                f"the router of layer {', '.join(broken)} gave logits that are not finite; "
                "lower optimizer.lr, or set model.moe.z_loss, and go on from the newest checkpoint",
                everywhere=True,
            )
        self._silent_reports = (self._silent_reports + 1) * (load == 0)
        dying = self._silent_reports == SILENT_REPORTS
        return RoutingReport(
            layers={
                layer: LayerHealth.of(load[i], rest["entropy"][i] / rest["tokens"][i].clamp(min=1), biases[i])
                for i, layer in enumerate(self.layers)
            },
            died={self.layers[i]: dying[i].nonzero().flatten().tolist() for i in range(len(dying)) if dying[i].any()},
        )

    def _biases(self, models: list[HybridLM]) -> Tensor:
        """The balance biases of all layers on all stages, on the CPU; zero where there are none. Collective."""
        if self.config.balance != "bias":
            return torch.zeros(self._silent_reports.shape)
        found = torch.full(self._silent_reports.shape, float("-inf"), device=self._step.device)
        for layer, router in _routers(models):
            found[self.layers.index(layer)] = _whole(router.balance_bias)
        return largest_over_ranks(found).cpu()


@dataclass(frozen=True)
class LayerHealth:
    """One layer's routing.

    Attributes:
        load: each expert's share of all choices; they sum to one.
        max_violation: the largest load over the mean, less one: 0 where all are alike.
        entropy: of the router's distribution over experts, in nats, mean over tokens; at most log(X).
        bias: the balance bias of each expert, zeros where there is none.
    """

    load: list[float]
    max_violation: float
    entropy: float
    bias: list[float]

    @classmethod
    def of(cls, counts_X: Tensor, entropy: Tensor, bias_X: Tensor) -> "LayerHealth":
        """From counted choices."""
        share_X = counts_X / counts_X.sum().clamp(min=1)
        violation = float(share_X.max() * len(share_X)) - 1
        return cls([round(x, 6) for x in share_X.tolist()], round(violation, 6), float(entropy), bias_X.tolist())


@dataclass(frozen=True)
class RoutingReport:
    """Health by layer, and experts by layer that have just been found dead."""

    layers: dict[int, LayerHealth]
    died: dict[int, list[int]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For `metrics.jsonl`: lists over `layers`. Nothing is ever dropped, and that is said."""
        health = self.layers.values()
        return {
            "layers": list(self.layers),
            "load": [layer.load for layer in health],
            "max_violation": [layer.max_violation for layer in health],
            "entropy": [layer.entropy for layer in health],
            "bias": [layer.bias for layer in health],
            "dropped": 0,
        }

    def warning(self) -> str | None:
        """A line about dead experts, None when there are none that were not told of before."""
        if not self.died:
            return None
        where = ", ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in self.died.items())
        return f"no token has gone to these experts in {SILENT_REPORTS} reports ({where}); raise model.moe.balance_loss"


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _routers(models: list[HybridLM]) -> list[tuple[int, Any]]:
    return [
        (int(number), block.mixer.router)
        for model in models
        for number, block in model.layers.items()
        if isinstance(block.mixer, MoE)
    ]
