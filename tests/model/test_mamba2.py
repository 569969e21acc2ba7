"""The Mamba-2 mixer against the paper's equations, written out token by token with plain numbers of the config."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.model import SequenceContext
from headrace.model.mixers.mamba2 import Mamba2, Mamba2Config

D, EPS = 10, 1e-3
BASE = Mamba2Config(num_heads=4, head_dim=3, d_state=5, num_groups=2)
VARIANTS = {
    "base": {},
    "biases": {"bias": True, "conv_bias": False},
    "per-channel-skip": {"skip": "channel"},
    "no-skip": {"skip": "none"},
    "whole-norm": {"gated_norm": "whole"},
    "norm-before-gate": {"norm_before_gate": True},
    "gate-only": {"gated_norm": "none"},
    "dt-limits": {"dt_limit": (0.3, 0.9)},
    "two-taps": {"d_conv": 2},
}


def build_layer(config: Mamba2Config) -> Mamba2:
    layer = config.build(D, EPS, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def norm(y: Tensor, config: Mamba2Config) -> Tensor:
    groups = config.num_groups if config.gated_norm == "group" else 1
    parts = y.view(groups, -1)
    return (parts / (parts.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten()


def mamba2_by_definition(layer: Mamba2, config: Mamba2Config, x_LD: Tensor, starts: set[int]) -> Tensor:
    """One row, token by token; `starts` are document starts."""
    H, P = 4, config.head_dim
    state = torch.zeros(H, P, config.d_state, dtype=torch.float64)
    history: list[Tensor] = []
    rows = []
    for t, token in enumerate(x_LD):
        if t in starts:
            state, history = torch.zeros_like(state), []
        z, dt = layer.in_z(token), layer.in_dt(token)
        history.append(torch.cat([layer.in_x(token), layer.in_B(token), layer.in_C(token)]))
        taps = [layer.conv_x, layer.conv_B, layer.conv_C]
        weight = torch.cat([tap.weight for tap in taps])
        mixed = sum(weight[:, config.d_conv - 1 - ago] * v for ago, v in enumerate(history[::-1][: config.d_conv]))
        if config.conv_bias:
            mixed = mixed + torch.cat([tap.bias for tap in taps if tap.bias is not None])
        x, B, C = F.silu(mixed).split([H * P, config.num_groups * config.d_state, config.num_groups * config.d_state])
        x, B, C = x.view(H, P), B.view(config.num_groups, -1), C.view(config.num_groups, -1)
        dt = torch.log1p(torch.exp(dt + layer.ssm.dt_bias)).clamp(*config.dt_limit)
        y = torch.zeros(H, P, dtype=torch.float64)
        for h in range(H):
            g = h // (H // config.num_groups)
            state[h] = torch.exp(-dt[h] * layer.ssm.A_log[h].exp()) * state[h] + dt[h] * torch.outer(x[h], B[g])
            y[h] = state[h] @ C[g] + (0 if layer.ssm.D is None else layer.ssm.D[h] * x[h])
        flat = y.flatten()
        if config.gated_norm == "none":
            out = flat * F.silu(z)
        elif config.norm_before_gate:
            out = norm(flat, config) * layer.norm.weight * F.silu(z)
        else:
            out = norm(flat * F.silu(z), config) * layer.norm.weight
        rows.append(layer.out_proj(out))
    return torch.stack(rows)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_layer_equals_the_definition(name: str) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[name])
    layer = build_layer(config)
    x_BLD = torch.randn(2, 14, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[1, [4, 5]] = True
    y_BLD = layer(x_BLD, SequenceContext(reset_BL=reset))
    for row, starts in enumerate((set(), {4, 5})):
        expected = mamba2_by_definition(layer, config, x_BLD[row], starts)
        torch.testing.assert_close(y_BLD[row], expected, rtol=0, atol=1e-12)


def test_first_values_follow_the_paper() -> None:
    config = Mamba2Config(num_heads=4000, head_dim=1, d_state=2, dt_floor=0.002)
    rules = config.build(4, EPS, 0).parameter_rules
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, *shape: int) -> Tensor:
        return rules[name].init.draw(torch.Size(shape), generator, 16)

    A = draw("ssm.A_log", 4000).exp()
    assert A.min() >= 1
    assert A.max() <= 16
    assert A.mean().item() == pytest.approx(8.5, abs=0.3)
    dt = F.softplus(draw("ssm.dt_bias", 4000))
    assert dt.min().item() == pytest.approx(0.002, rel=1e-3)
    assert dt.max().item() == pytest.approx(0.1, rel=0.02)
    assert dt.log().median().item() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.15)
    assert torch.equal(draw("ssm.D", 7), torch.ones(7))
    assert draw("conv_x.weight", 4000, 4).abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert draw("in_x.weight", 500, 64).abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    # Sixteen residual layers: the last matrix of each branch is a quarter as large.
    assert draw("out_proj.weight", 500, 64).abs().max().item() == pytest.approx(1 / 32, rel=0.01)


def test_ssm_parameters_stay_float32_beside_bfloat16() -> None:
    layer = Mamba2Config(head_dim=8, d_state=4).build(16, EPS, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.bfloat16()
    assert layer.ssm.keep_fp32
    layer.ssm.float()
    dt, A, D = layer.ssm(torch.randn(1, 3, 4, dtype=torch.bfloat16))
    assert {dt.dtype, A.dtype, D.dtype} == {torch.float32}
    assert D.data_ptr() != layer.ssm.D.data_ptr()
    y = layer(torch.randn(1, 20, 16, dtype=torch.bfloat16), SequenceContext())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
