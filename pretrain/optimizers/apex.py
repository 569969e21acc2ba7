"""AdamW through NVIDIA Apex's fused kernels, where they are installed and asked for."""

import importlib
from typing import Any

import torch

from ...errors import UserError
from .adamw import AdamW


class _Skip:
    """What Apex asks of a gradient scaler: whether gradients overflowed, and their scale."""

    def __init__(self, skip: torch.Tensor) -> None:
        self.skip = skip.view(1)

    def _check_inf_per_device(self, _optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        return {self.skip.device: self.skip}

    def _get_scale_async(self) -> torch.Tensor:
        return torch.ones_like(self.skip)


class ApexAdamW(AdamW):
    """`AdamW`, the same state included, computed by `apex.optimizers.FusedAdam` without synchronising.

    Raises:
        UserError: Apex, or its CUDA extension, is not there.
    """

    def _build(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        try:
            fused = importlib.import_module("apex.optimizers").FusedAdam
            return fused(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, capturable=True)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"optimizer.implementation=apex cannot be had here ({error}); build NVIDIA Apex with its CUDA "
                "extension, or use torch",
                everywhere=True,
            ) from None

    def _step(self, lr: float, skip: torch.Tensor) -> None:
        inner: Any = self.inner
        inner._dummy_overflow_buf.zero_()  # else Apex would count as the update before this one went
        for group in inner.param_groups:
            group["lr"].fill_(lr)
            group["step"] = inner.state[group["params"][0]]["step"].to(torch.int32)
        inner.step(grad_scaler=_Skip(skip))
        for slots in inner.state.values():
            slots["step"] += 1.0 - skip
