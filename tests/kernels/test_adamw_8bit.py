"""8-bit AdamW: bitsandbytes' code books and steps, the definition's results, and blocks that no cut can change."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.cpu import ops as bnb_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.adamw_8bit import (
    BlockGrid,
    Moments,
    Rounding,
    Update,
    adamw_8bit_,
    adamw_8bit_reference,
    block_maxima,
    code_book,
    dequantise,
    quantise,
)

CPU = torch.device("cpu")
GO, SKIP = torch.zeros(()), torch.ones(())
NUMBERS = Update(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=torch.ones(()), skip=GO)


def spread_out(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers over many decades, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.rand(shape, generator=generator, dtype=torch.float64) ** 6).to(dtype)


@pytest.mark.parametrize("signed", [True, False])
def test_code_books_are_bitsandbytes(signed: bool) -> None:
    assert torch.equal(code_book(signed, CPU).values, bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_is_nearest_everywhere(signed: bool) -> None:
    """Around every value and every threshold, and beyond all."""
    book = code_book(signed, CPU)
    points = torch.cat([book.values, book.thresholds[:-1], torch.tensor([0.0, -0.0, 1e-44, 1.5])])
    points = torch.cat([points, points.nextafter(torch.tensor(9.0)), points.nextafter(torch.tensor(-9.0))])
    points = torch.cat([points, -points, spread_out((20_000,), 0)])
    expected = (points[:, None] - book.values).abs().argmin(1)
    assert torch.equal(book.nearest(points).long(), expected)


def exact_quantiser(x: Tensor, code: Tensor, scales_out: Tensor, codes_out: Tensor, block_size: int) -> None:
    """bitsandbytes' quantiser by distances; its float32 one reads a table of 65,536 even steps and misses codes."""
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, block_size)
    codes_out.copy_(codes)
    scales_out.copy_(scales)


@pytest.mark.parametrize("signed", [True, False])
def test_quantiser_is_bitsandbytes_to_the_last_code(signed: bool) -> None:
    x = spread_out((64, 1024), 1)
    x = x if signed else x.square()
    codes, scales = torch.empty(64, 1024, dtype=torch.uint8), torch.empty(64 * 4)
    exact_quantiser(x, bnb.create_dynamic_map(signed=signed), scales, codes, 256)
    ours = quantise(x, signed, 256)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1].flatten(), scales)
    fast, _ = torch.ops.bitsandbytes.quantize_blockwise(x, bnb.create_dynamic_map(signed=signed), 256)
    error = (dequantise(*ours, signed, 256) - x).abs()
    assert bool((error <= (dequantise(fast, ours[1], signed, 256) - x).abs()).all())


def test_updates_are_bitsandbytes_to_the_last_code() -> None:
    """Twenty updates; both sides round moments by distance, bitsandbytes' arithmetic is its own."""
    p = spread_out((16, 768), 2)
    theirs_p, ours_p = p.clone(), p.clone()
    theirs, ours = Moments.zeros(16, 768, 3, CPU), Moments.zeros(16, 768, 3, CPU)
    books = [code_book(signed, CPU).values for signed in (True, False)]
    with mock.patch.object(bnb_cpu, "_quant_blockwise_fp32_direct", exact_quantiser):
        for step in range(1, 21):
            grad = spread_out((16, 768), 100 + step)
            bnb.optimizer_update_8bit_blockwise(
                "adam", grad, theirs_p, theirs.codes1, theirs.codes2, 0.9, 0.95, 0.0, 0.0, 1e-8, step, 0.01,
                *books, theirs.scales1.view(-1), theirs.scales2.view(-1), weight_decay=0.1,
            )  # fmt: skip
            update = replace(NUMBERS, step=torch.tensor(float(step)))
            adamw_8bit_(ours_p, grad, ours, update, grid=BlockGrid.whole(768, 256))
            for theirs_state, our_state in zip(theirs, ours, strict=True):
                assert torch.equal(theirs_state, our_state)
    torch.testing.assert_close(ours_p, theirs_p, rtol=1e-6, atol=1e-7)


def random_moments(rows: int, columns: int, block_size: int, seed: int) -> Moments:
    m, v = spread_out((rows, columns), seed), spread_out((rows, columns), seed + 1).square()
    return Moments(*quantise(m, True, block_size), *quantise(v, False, block_size))


def copied(moments: Moments) -> Moments:
    return Moments(*(t.clone() for t in moments))


def own_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 200),
    block_size=st.sampled_from([16, 64, 256]),
    cuts=st.sets(st.integers(1, 199), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_the_definition_however_it_is_cut(
    rows: int, columns: int, block_size: int, cuts: set[int], dtype: torch.dtype
) -> None:
    p, grad = spread_out((rows, columns), 3, dtype), spread_out((rows, columns), 4, dtype)
    grad[:, : columns // 3] = 0.0
    moments = random_moments(rows, columns, block_size, 5)
    update = replace(NUMBERS, step=torch.tensor(7.0))
    expected_p, expected = adamw_8bit_reference(p, grad, moments, update, block_size)
    whole_p, whole = p.clone(), copied(moments)
    adamw_8bit_(whole_p, grad, whole, update, grid=BlockGrid.whole(columns, block_size))
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(whole_p, expected_p, rtol=rounding, atol=rounding)
    for ours, theirs in zip(whole, expected, strict=True):
        # Sums are rounded differently: a moment beside a threshold may fall to its other side.
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=1e-6, atol=1 if ours.dtype == torch.uint8 else 0
        )

    bounds = [0, *sorted(cut for cut in cuts if cut < columns), columns]
    parts = []
    for begin, end in pairwise(bounds):
        own = copied(moments)._replace(
            codes1=own_copy(moments.codes1[:, begin:end]),
            codes2=own_copy(moments.codes2[:, begin:end]),
        )
        grid = BlockGrid(columns, block_size, begin, end - begin, begin // block_size)
        parts.append((own_copy(p[:, begin:end]), grad[:, begin:end], own, grid))
    maxima = torch.stack([block_maxima(g, own, update, grid=grid) for _, g, own, grid in parts]).amax(0)
    for part_p, part_grad, own, grid in parts:
        adamw_8bit_(part_p, part_grad, own, update, grid=grid, maxima=maxima)
        span = slice(grid.first, grid.first + grid.columns)
        assert torch.equal(part_p, whole_p[:, span])
        assert torch.equal(own.codes1, whole.codes1[:, span])
        assert torch.equal(own.codes2, whole.codes2[:, span])
        assert torch.equal(own.scales1, whole.scales1)
        assert torch.equal(own.scales2, whole.scales2)


def test_a_skipped_update_changes_nothing() -> None:
    p, moments = spread_out((3, 40), 6), random_moments(3, 40, 16, 7)
    before_p, before = p.clone(), copied(moments)
    grid = BlockGrid.whole(40, 16)
    nan = torch.full_like(p, float("nan"))
    update = replace(NUMBERS, skip=SKIP)
    adamw_8bit_(p, nan, moments, update, grid=grid)
    adamw_8bit_(p, nan, moments, update, grid=grid, maxima=block_maxima(nan, moments, update, grid=grid))
    assert torch.equal(p, before_p)
    assert all(torch.equal(a, b) for a, b in zip(moments, before, strict=True))


def test_tiny_and_zero_blocks_stay_finite() -> None:
    """The largest magnitude of a block may be zero or no normal number: its reciprocal would be infinite."""
    p, moments = torch.zeros(3, 16), Moments.zeros(3, 16, 1, CPU)
    grad = torch.tensor([[0.0], [1e-42], [1e-21]]).expand(3, 16).contiguous()
    for step in range(1, 4):
        update = replace(NUMBERS, step=torch.tensor(float(step)))
        adamw_8bit_(p, grad, moments, update, grid=BlockGrid.whole(16, 16))
    assert bool(p.isfinite().all())
    assert bool((p[0] == 0).all())


def test_stochastic_rounding_keeps_the_mean_and_does_not_see_cuts() -> None:
    rows, columns, repeats = 8, 64, 200
    grad = torch.ones(rows, columns, dtype=torch.bfloat16)
    grid = BlockGrid.whole(columns, 16)
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for repeat in range(repeats):
        p = torch.ones(rows, columns, dtype=torch.bfloat16)
        update = replace(NUMBERS, lr=0.001, weight_decay=0.0)
        adamw_8bit_(
            p, grad, Moments.zeros(rows, columns, 4, CPU), update, grid=grid,
            rounding=Rounding(repeat, torch.arange(rows)),
        )  # fmt: skip
        total += p
    mean = total / repeats
    assert abs(float(mean.mean()) - 0.999) < 3e-5  # one unit in the last place is 0.0039
    assert float((mean - 0.999).abs().max()) < 0.002

    p, half = torch.ones(rows, columns, dtype=torch.bfloat16), torch.ones(4, 16, dtype=torch.bfloat16)
    update = replace(NUMBERS, lr=0.001, weight_decay=0.0)
    adamw_8bit_(
        p, grad, Moments.zeros(rows, columns, 4, CPU), update, grid=grid, rounding=Rounding(3, torch.arange(rows))
    )
    cut = BlockGrid(columns, 16, 32, 16, 0)
    lower = Rounding(3, torch.arange(4, 8))
    adamw_8bit_(half, grad[4:, 32:48], Moments.zeros(4, 16, 1, CPU), update, grid=cut, rounding=lower)
    assert torch.equal(half, p[4:, 32:48])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_RC": torch.zeros(3, 39)}, "the gradient has shape"),
        ({"p_RC": torch.zeros(40, 3).t()}, "must be contiguous"),
        ({"grid": BlockGrid.whole(41, 16)}, "40 columns and the grid 41"),
        ({"moments": Moments.zeros(3, 40, 2, CPU)}, "scales1 is torch.float32"),
        ({"moments": Moments.zeros(3, 39, 3, CPU)}, "codes1 is torch.uint8"),
        ({"maxima": torch.zeros(2, 3, 4)}, "maxima have shape"),
        ({"rounding": Rounding(0, torch.arange(3))}, "for bfloat16 parameters"),
        ({"p_RC": torch.zeros(3, 40).double(), "backend": "triton"}, "Triton cannot run: float64"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict, message: str) -> None:
    arguments = {
        "p_RC": torch.zeros(3, 40),
        "grad_RC": torch.zeros(3, 40),
        "moments": Moments.zeros(3, 40, 3, CPU),
        "update": NUMBERS,
        "grid": BlockGrid.whole(40, 16),
    }
    with pytest.raises(ValueError, match=message):
        adamw_8bit_(**(arguments | change))
