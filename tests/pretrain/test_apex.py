"""Apex's fused AdamW through its own interface, played on the CPU by a stand-in with the same arguments and buffers."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from headrace.errors import UserError
from headrace.pretrain.optimizers.adamw import AdamW
from headrace.pretrain.optimizers.apex import ApexAdamW


class FusedAdam(torch.optim.Optimizer):
    """As `apex.optimizers.FusedAdam` with `capturable=True` reads its groups, state and gradient scaler."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool, capturable: bool) -> None:
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, grad_scaler: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int32).view(())
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[group["params"][0].device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            if int(self._dummy_overflow_buf):
                continue
            number = int(group["step"])
            for p in group["params"]:
                state, grad = self.state[p], p.grad * inverse
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1**number)
                spread = (state["exp_avg_sq"] / (1 - beta2**number)).sqrt() + group["eps"]
                p -= group["lr"] * (mean / spread + group["weight_decay"] * p)


def test_is_adamw_and_keeps_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped update in between: it neither counts nor changes anything."""
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    runs = {}
    for kind in (AdamW, ApexAdamW):
        generator = torch.Generator().manual_seed(0)
        p = {name: torch.randn(5, 3, generator=generator) for name in ("a", "b")}
        optimizer = kind(p, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay={"a": 0.1, "b": 0.0})
        for step in range(6):
            for parameter in p.values():
                parameter.grad = torch.randn(5, 3, generator=generator)
            optimizer.step(1.0 - 0.1 * step, torch.tensor(float(step == 2)))
        runs[kind] = p, optimizer.state()
    for expected, found in zip(runs[AdamW], runs[ApexAdamW], strict=True):
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert float(runs[ApexAdamW][1]["step.a"]) == 5.0


def test_without_apex_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(UserError, match=r"implementation=apex cannot be had here .*build NVIDIA Apex"):
        ApexAdamW({"a": torch.zeros(2)}, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay={"a": 0.0})
