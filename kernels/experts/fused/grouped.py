"""Products by expert on a GPU.

Letters: `S` rows ordered by expert, `X` experts, `F` and `O` columns in and out. Where an expert's rows end, only the
device knows. The grid is as large as any distribution of the rows needs, and a program finds its expert by itself.

Tiles of rows are numbered so that no sum over experts is needed. With tiles of b rows, expert x, whose rows begin at s
and end before e, has the numbers from `s // b + x` to `e // b + x`: one to spare at most, as `ceil((e - s) / b)` is
never above `e // b - s // b + 1`. Behind the last expert come the rows of nobody, as if of one expert more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, launch
from ...tiles import Tile, tile

# Fewer rows an expert than these leave large tiles mostly empty.
FEW_ROWS = 64


def grouped_linear(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor, transposed: bool) -> Tensor:
    """Return `(S, O)`, or with `transposed` matrices `(S, F)` of `x` `(S, O)`; arguments contiguous."""
    (S, width), (X, O, F) = x_SF.shape, weight_XOF.shape  # noqa: E741
    columns = F if transposed else O
    y_SO = x_SF.new_empty(S, columns)
    choice = _tile("grouped_linear", x_SF, columns, "few" if S < FEW_ROWS * X else "many")
    launch(
        _grouped_linear_kernel,
        ((S // choice["block_s"] + X + 1) * triton.cdiv(columns, choice["block_o"]),),
        y_ptr=y_SO,
        x_ptr=x_SF,
        weight_ptr=weight_XOF,
        ends_ptr=ends_X,
        S=S,
        X=X,
        width=width,
        columns=columns,
        expert_stride=O * F,
        column_stride=1 if transposed else F,
        width_stride=F if transposed else 1,
        PRECISION=_precision(x_SF),
        EXPERTS=triton.next_power_of_2(X),
        BLOCK_S=choice["block_s"],
        BLOCK_O=choice["block_o"],
        BLOCK_F=choice["block_f"],
        GROUP=choice["group"],
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )
    return y_SO


def grouped_weight_gradient(dy_SO: Tensor, x_SF: Tensor, ends_X: Tensor) -> Tensor:
    """Return `(X, O, F)`: the gradient of the matrices; arguments contiguous."""
    O, F, X = dy_SO.shape[1], x_SF.shape[1], len(ends_X)  # noqa: E741
    dweight_XOF = x_SF.new_empty(X, O, F)
    choice = _tile("grouped_weight_gradient", x_SF, O, "many")
    launch(
        _grouped_weight_gradient_kernel,
        (X * triton.cdiv(O, choice["block_o"]) * triton.cdiv(F, choice["block_f"]),),
        dweight_ptr=dweight_XOF,
        dy_ptr=dy_SO,
        x_ptr=x_SF,
        ends_ptr=ends_X,
        O=O,
        F=F,
        PRECISION=_precision(x_SF),
        BLOCK_S=choice["block_s"],
        BLOCK_O=choice["block_o"],
        BLOCK_F=choice["block_f"],
        GROUP=choice["group"],
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )
    return dweight_XOF


def _tile(kernel: str, x: Tensor, columns: int, size: str) -> Tile:
    """Float32 takes small tiles, and so do widths that Triton does not know to be aligned: both need many registers."""
    small = x.dtype == torch.float32 or x.shape[1] % 16 or columns % 16
    return tile(kernel, architecture(x), "small" if small else size)


def _precision(x: Tensor) -> str:
    """How float32 products are computed: with full precision on every architecture."""
    return "tf32x3" if x.dtype == torch.float32 and architecture(x).startswith("sm_") else "ieee"


@triton.jit
def _in_groups(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    # Programs that run side by side take a few tiles of rows and go through the columns together: caches then serve
    # both operands.
    per_group = GROUP * column_tiles
    first = number // per_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = number % per_group
    return first + within % size, within // size


@triton.jit
def _grouped_linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    ends_ptr,
    S,
    X,
    width,
    columns,
    expert_stride,
    column_stride,
    width_stride,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP: tl.constexpr,
):
    number, column_tile = _in_groups(tl.program_id(0), S // BLOCK_S + X + 1, tl.cdiv(columns, BLOCK_O), GROUP)
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + experts, mask=experts < X, other=0)
    before = (experts < X) & (ends // BLOCK_S + experts + 1 <= number)
    expert = tl.sum(before.to(tl.int32), 0)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert, mask=expert < X, other=S)
    first = start + (number - start // BLOCK_S - expert) * BLOCK_S
    if first < end:
        row = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        column = column_tile * BLOCK_O + tl.arange(0, BLOCK_O)
        in_rows, in_columns = row < end, (column < columns)[None, :]
        inner = tl.arange(0, BLOCK_F)
        x_ptrs = x_ptr + row * width + inner[None, :]
        weight_ptrs = weight_ptr + tl.minimum(expert, X - 1).to(tl.int64) * expert_stride
        weight_ptrs += column.to(tl.int64)[None, :] * column_stride + inner.to(tl.int64)[:, None] * width_stride
        total = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
        left = tl.where(expert < X, width, 0)
        for _ in range(0, tl.cdiv(left, BLOCK_F)):
            x = tl.load(x_ptrs, mask=in_rows & (inner < left)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=in_columns & (inner < left)[:, None], other=0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION)
            x_ptrs += BLOCK_F
            weight_ptrs += BLOCK_F * width_stride
            left -= BLOCK_F
        tl.store(y_ptr + row * columns + column[None, :], total, mask=in_rows & in_columns)


@triton.jit
def _grouped_weight_gradient_kernel(
    dweight_ptr,
    dy_ptr,
    x_ptr,
    ends_ptr,
    O,  # noqa: E741
    F,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP: tl.constexpr,
):
    o_tiles, f_tiles = tl.cdiv(O, BLOCK_O), tl.cdiv(F, BLOCK_F)
    expert = tl.program_id(0) // (o_tiles * f_tiles)
    o_tile, f_tile = _in_groups(tl.program_id(0) % (o_tiles * f_tiles), o_tiles, f_tiles, GROUP)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    o, f = o_tile * BLOCK_O + tl.arange(0, BLOCK_O), f_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.arange(0, BLOCK_S)
    first_row = (start + row).to(tl.int64)[:, None]
    dy_ptrs, x_ptrs = dy_ptr + first_row * O + o[None, :], x_ptr + first_row * F + f[None, :]
    left = end - start
    total = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
    for _ in range(0, tl.cdiv(left, BLOCK_S)):
        inside = (row < left)[:, None]
        dy = tl.load(dy_ptrs, mask=inside & (o < O)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside & (f < F)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision=PRECISION)
        dy_ptrs += BLOCK_S * O
        x_ptrs += BLOCK_S * F
        left -= BLOCK_S
    dweight_ptr += expert.to(tl.int64) * O * F
    at = o.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(dweight_ptr + at, total, mask=(o < O)[:, None] & (f < F)[None, :])
