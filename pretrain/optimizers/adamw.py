"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) through PyTorch's fused kernel, on each rank's own part."""

from collections.abc import Mapping
from typing import Any

import torch

from .sharded import like_parameter, local_part


class AdamW:
    """Torch's fused AdamW over local parts: the update is elementwise, so sharding does not change it.

    Of parameters in bfloat16 a float32 copy is updated, and rounded to them.

    Args:
        parameters: name to parameter, plain or DTensor.
        lr: peak learning rate.
        betas, eps: as in the paper's algorithm 2.
        weight_decay: of each parameter, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Mapping[str, float],
    ) -> None:
        self.parameters = dict(parameters)
        self.lr = lr
        # What is updated: the parameter itself, or the float32 copy of a narrower one.
        self.local = {name: _wide(local_part(parameter)) for name, parameter in self.parameters.items()}
        groups: list[dict[str, Any]] = [
            {
                "params": [local for name, local in self.local.items() if weight_decay[name] == decay],
                "weight_decay": decay,
            }
            for decay in dict.fromkeys(weight_decay[name] for name in self.local)
        ]
        self.inner = self._build(groups, lr=lr, betas=betas, eps=eps)
        for local in self.local.values():
            self.inner.state[local] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device),
                "exp_avg": torch.zeros_like(local),
                "exp_avg_sq": torch.zeros_like(local),
            }

    def step(self, lr_scale: float, skip: torch.Tensor) -> None:
        """See `Optimizer.step`."""
        for name, parameter in self.parameters.items():
            self.local[name].grad = None if parameter.grad is None else _wide(local_part(parameter.grad))
        self._step(self.lr * lr_scale, skip)
        self.inner.zero_grad()  # else these references keep the gradients in memory until the next update
        for name, parameter in self.parameters.items():
            if parameter.dtype != self.local[name].dtype:
                local_part(parameter).copy_(self.local[name])

    def _build(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def _step(self, lr: float, skip: torch.Tensor) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        # The seam that gradient scalers use to skip without synchronising.
        self.inner.found_inf = skip  # type: ignore[attr-defined]
        self.inner.step()

    def state(self) -> dict[str, torch.Tensor]:
        """See `Optimizer.state`."""
        found = {}
        for name, parameter in self.parameters.items():
            slots = self.inner.state[self.local[name]]
            found[f"step.{name}"] = slots["step"]
            for slot in ("exp_avg", "exp_avg_sq"):
                found[f"{slot}.{name}"] = like_parameter(slots[slot], parameter)
            if parameter.dtype != self.local[name].dtype:
                found[f"master.{name}"] = like_parameter(self.local[name], parameter)
        return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x`, as float32 where its dtype is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
