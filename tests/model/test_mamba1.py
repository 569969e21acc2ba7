"""The Mamba-1 mixer against the paper's equations, written out token by token with plain numbers of the config."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.model import LayerStates, SequenceContext
from headrace.model.mixers.mamba1 import Mamba1, Mamba1Config

D, EPS = 10, 1e-3
BASE = Mamba1Config(d_state=5, dt_rank=3)
VARIANTS = {
    "base": {},
    "biases": {"bias": True, "conv_bias": False},
    "norms": {"inner_norms": True},
    "one-state": {"d_state": 1, "dt_rank": 1, "expand": 1},
    "two-taps": {"d_conv": 2},
}


def build_layer(config: Mamba1Config) -> Mamba1:
    layer = config.build(D, EPS, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def norm(x: Tensor, module: torch.nn.Module | None) -> Tensor:
    return x if module is None else x / (x.square().mean() + EPS).sqrt() * module.weight


def mamba1_by_definition(layer: Mamba1, config: Mamba1Config, x_LD: Tensor, starts: set[int]) -> Tensor:
    """One row, token by token; `starts` are document starts."""
    inner = int(config.expand * D)
    state = torch.zeros(inner, config.d_state, dtype=torch.float64)
    history: list[Tensor] = []
    rows = []
    for t, token in enumerate(x_LD):
        if t in starts:
            state, history = torch.zeros_like(state), []
        z = layer.in_z(token)
        history.append(layer.in_x(token))
        taps = layer.conv_x.weight
        x = sum(taps[:, config.d_conv - 1 - ago] * v for ago, v in enumerate(history[::-1][: config.d_conv]))
        x = F.silu(x if layer.conv_x.bias is None else x + layer.conv_x.bias)
        rank, B, C = (
            norm(weight @ x, module)
            for weight, module in (
                (layer.x_dt.weight, layer.dt_norm),
                (layer.x_B.weight, layer.B_norm),
                (layer.x_C.weight, layer.C_norm),
            )
        )
        dt = torch.log1p(torch.exp(layer.dt_proj.weight @ rank + layer.ssm.dt_bias))
        channels, y = [], []
        for i in range(inner):
            decay = torch.exp(-dt[i] * layer.ssm.A_log[i].exp())
            channels.append(decay * state[i] + dt[i] * x[i] * B)
            y.append(channels[i] @ C + layer.ssm.D[i] * x[i])
        state = torch.stack(channels)
        rows.append(layer.out_proj(torch.stack(y) * F.silu(z)))
    return torch.stack(rows)


def draw_inputs() -> tuple[Tensor, Tensor]:
    x_BLD = torch.randn(2, 14, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[1, [4, 5]] = True
    return x_BLD, reset


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_and_gradients_equal_the_definition(name: str) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[name])
    layer = build_layer(config)
    x_BLD, reset = draw_inputs()
    x_BLD.requires_grad_()
    inputs = [x_BLD, *layer.parameters()]
    y_BLD = layer(x_BLD, SequenceContext(reset_BL=reset))
    expected = torch.stack(
        [mamba1_by_definition(layer, config, x_BLD[row], starts) for row, starts in enumerate((set(), {4, 5}))]
    )
    torch.testing.assert_close(y_BLD, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y_BLD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, known = (torch.autograd.grad((y * weights).sum(), inputs) for y in (y_BLD, expected))
    for gradient, exact in zip(found, known, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_single_tokens_equal_the_whole(name: str) -> None:
    """Through the step for decoding, with a document that begins in the middle of the stream."""
    layer = build_layer(dataclasses.replace(BASE, **VARIANTS[name]))
    x_BLD, reset = draw_inputs()
    whole = layer(x_BLD, SequenceContext(reset_BL=reset))
    states = LayerStates()
    tokens = [
        layer(x_BLD[:, t : t + 1], SequenceContext(reset_BL=reset[:, t : t + 1], states=states)) for t in range(14)
    ]
    torch.testing.assert_close(torch.cat(tokens, 1), whole, rtol=1e-12, atol=1e-12)
    assert set(states.layers[0]) == {"ssm", "conv"}


def test_first_values_follow_the_paper() -> None:
    config = Mamba1Config(d_state=6, expand=1000, dt_floor=0.002)
    rules = config.build(64, EPS, 0).parameter_rules
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, *shape: int) -> Tensor:
        return rules[name].init.draw(torch.Size(shape), generator, 16)

    torch.testing.assert_close(draw("ssm.A_log", 4000, 6).exp(), torch.arange(1.0, 7.0).expand(4000, 6))
    dt = F.softplus(draw("ssm.dt_bias", 4000))
    assert dt.min().item() == pytest.approx(0.002, rel=1e-3)
    assert dt.max().item() == pytest.approx(0.1, rel=0.02)
    assert dt.log().median().item() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.15)
    assert torch.equal(draw("ssm.D", 7), torch.ones(7))
    # Uniform in plus or minus dt_rank ** -0.5, here with the rank that 64 channels get.
    assert config.rank(64) == 4
    assert draw("dt_proj.weight", 4000, 4).abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert draw("x_B.weight", 500, 64).abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert draw("conv_x.weight", 4000, 4).abs().max().item() == pytest.approx(0.5, rel=0.01)
    # Sixteen residual layers: the last matrix of each branch is a quarter as large.
    assert draw("out_proj.weight", 500, 64).abs().max().item() == pytest.approx(1 / 32, rel=0.01)


def test_the_rank_of_step_sizes_is_a_sixteenth_rounded_up() -> None:
    assert [Mamba1Config().rank(width) for width in (768, 769, 16, 1)] == [48, 49, 1, 1]


@pytest.mark.parametrize("inner_norms", [False, True])
def test_ssm_parameters_stay_float32_beside_bfloat16(inner_norms: bool) -> None:
    layer = Mamba1Config(d_state=4, inner_norms=inner_norms).build(16, EPS, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.bfloat16()
    assert layer.ssm.keep_fp32
    layer.ssm.float()
    dt, A, D = layer.ssm(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert {dt.dtype, A.dtype, D.dtype} == {torch.float32}
    assert D.data_ptr() != layer.ssm.D.data_ptr()
    y = layer(torch.randn(1, 20, 16, dtype=torch.bfloat16), SequenceContext())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
