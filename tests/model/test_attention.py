"""Attention against its definition written out token by token, and the masks of its fast paths against each other."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from headrace.model import LayerStates, SequenceContext
from headrace.model.mixers import attention
from headrace.model.mixers.attention import (
    BLOCK_QUERIES,
    Attention,
    AttentionConfig,
    SlidingAttentionConfig,
    _block_mask,
    _mask,
    attend,
    rotary_tables,
)

D = 12
CONFIGS = {
    "plain": AttentionConfig(num_heads=3),
    "grouped": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, bias=True, softmax_scale=0.3),
    "rope": AttentionConfig(num_heads=2, rope_fraction=1.0, rope_theta=50.0),
    "partial-rope": AttentionConfig(num_heads=2, head_dim=8, rope_fraction=0.5),
    "window": SlidingAttentionConfig(num_heads=2, num_kv_heads=1, rope_fraction=1.0, window=4),
    "window-of-one": SlidingAttentionConfig(num_heads=2, window=1),
}


def build_layer(config: AttentionConfig) -> Attention:
    layer = config.build(D, 1e-5, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def turn(vector: Tensor, position: int, dims: int, theta: float) -> Tensor:
    """Rotary positions: channels i and i + dims/2 are one complex number, turned by position * theta^(-2i/dims)."""
    half = dims // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(vector[:half], vector[half:dims]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, vector[dims:]])


def attention_by_definition(layer: Attention, config: AttentionConfig, x_LD: Tensor, starts: list[int]) -> Tensor:
    """One row, token by token; `starts` are the document starts, the row's start included."""
    width, shared = layer.head_dim, config.num_heads // config.kv_heads
    rows = []
    for t, x in enumerate(x_LD):
        start = max(s for s in starts if s <= t)
        seen = range(start if config.span is None else max(start, t - config.span + 1), t + 1)
        heads = []
        for h in range(config.num_heads):
            own, kv = slice(h * width, (h + 1) * width), slice(h // shared * width, (h // shared + 1) * width)
            q = turn(layer.q_proj(x)[own], t - start, layer.rope_dims, layer.rope_theta)
            keys = [turn(layer.k_proj(x_LD[s])[kv], s - start, layer.rope_dims, layer.rope_theta) for s in seen]
            scores = torch.stack([q @ key for key in keys]) * (config.softmax_scale or 1 / math.sqrt(width))
            values = torch.stack([layer.v_proj(x_LD[s])[kv] for s in seen])
            heads.append(scores.softmax(0) @ values)
        rows.append(layer.out_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("starts", [[0], [0, 5, 6]], ids=["plain", "packed"])
@torch.no_grad()
def test_layer_equals_the_definition(name: str, starts: list[int]) -> None:
    config, layer = CONFIGS[name], build_layer(CONFIGS[name])
    x_BLD = torch.randn(2, 11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, starts[1:]] = True
    y_BLD = layer(x_BLD, SequenceContext(reset_BL=reset if len(starts) > 1 else None))
    torch.testing.assert_close(y_BLD[0], attention_by_definition(layer, config, x_BLD[0], starts), rtol=0, atol=1e-12)
    torch.testing.assert_close(y_BLD[1], attention_by_definition(layer, config, x_BLD[1], [0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("rows", [1, 3])
def test_flex_attention_sees_the_same_keys(window: int | None, rows: int) -> None:
    L = 200
    generator = torch.Generator().manual_seed(2)
    seq = SequenceContext(reset_BL=torch.rand(rows, L, generator=generator) < 0.03)
    position = seq.position_BL(L, torch.device("cpu"))
    q = torch.randn(rows, 4, L, 16, generator=generator)
    k, v = torch.randn(2, rows, 2, L, 16, generator=generator)
    dense = attend(q, k, v, seq, window=window, scale=0.2)
    blocks = flex_attention(q, k, v, block_mask=_block_mask(position, L, window), scale=0.2, enable_gqa=True)
    torch.testing.assert_close(blocks, dense, rtol=1e-5, atol=1e-5)
    # The last queries alone, with all keys, as a segment of a row has them.
    part = flex_attention(
        q[:, :, 70:], k, v, block_mask=_block_mask(position[:, 70:], L, window), scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(part, dense[:, :, 70:], rtol=1e-5, atol=1e-5)


def test_keys_before_a_row_of_one_document_are_not_taken_for_its_own() -> None:
    """A window's halo makes more keys than queries: plain causal order would then hide and show the wrong ones."""
    q, k, v = torch.randn(3, 1, 2, 10, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    halo = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    alone = attend(q, k, v, SequenceContext(), window=20, scale=0.2)
    padded = (torch.cat([halo, value], 2) for value in (k, v))
    torch.testing.assert_close(attend(q, *padded, SequenceContext(), window=20, scale=0.2), alone)


def test_mask_by_hand() -> None:
    seq = SequenceContext(reset_BL=torch.tensor([[False, False, True, False]]))
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    mask = _mask(seq.position_BL(4, torch.device("cpu")), 4, None, torch.float32)
    assert torch.equal(mask[0, 0], seen.log())


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("past", [0, 30])
def test_blocks_of_queries_equal_sdpa(
    window: int | None, packed: bool, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    L = 2 * BLOCK_QUERIES + 44
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, L, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, past + L, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = [q, k.requires_grad_(), v.requires_grad_()]
    reset = torch.rand(2, L, generator=generator) < 0.02 if packed else None
    dy = torch.randn(q.shape, generator=generator, dtype=torch.float64)

    def results() -> list[Tensor]:
        states = LayerStates()
        states.position_B = torch.full((2,), past)
        y = attend(*inputs, SequenceContext(reset, states if past else None), window=window, scale=0.3)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    blocks = results()
    monkeypatch.setattr(attention, "MOST_PROBABILITIES", 0)
    for actual, expected in zip(blocks, results(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_long_rows_keep_no_probabilities() -> None:
    q = torch.zeros(1, 1, 1, 8).expand(1, 64, 1 << 11, 8)
    assert not attention._blocks_are_faster(q, 1 << 11)
    assert attention._blocks_are_faster(q[:, :1], 1 << 11)
    assert not attention._blocks_are_faster(q[:, :1].bfloat16(), 1 << 11)


@torch.no_grad()
def test_a_window_keeps_only_its_keys() -> None:
    layer, states = build_layer(CONFIGS["window"]), LayerStates()
    x_BLD = torch.randn(1, 30, D, dtype=torch.float64)
    for piece in x_BLD.split(7, 1):
        layer(piece, SequenceContext(states=states))
    keys = states.get(0, "keys")
    assert keys is not None
    assert keys.shape == (1, 1, 3, 6)
    assert keys.untyped_storage().nbytes() == keys.nbytes


def test_rotary_angles_are_exact_far_into_a_document() -> None:
    states, like = LayerStates(), torch.zeros(1)
    states.position_B = torch.tensor([(1 << 20) + 12345])
    cos, _ = rotary_tables(SequenceContext(states=states), 3, 32, 10000.0, like)
    expected = [math.cos(((1 << 20) + 12347) / 10000 ** (2 * i / 32)) for i in range(16)]
    torch.testing.assert_close(cos[0, 0, 2], torch.tensor(expected), rtol=0, atol=1e-6)


def test_positions_continue_in_a_stream() -> None:
    states = LayerStates()
    reset = torch.tensor([[False, True, False, False, False], [False, False, False, True, False]])
    got = []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        seq = SequenceContext(reset_BL=reset[:, start:end], states=states)
        got.append(seq.position_BL(end - start, torch.device("cpu")))
        seq.advance(end - start, torch.device("cpu"), 2)
    assert torch.cat(got, 1).tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 0, 1]]
