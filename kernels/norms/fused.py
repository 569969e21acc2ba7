"""Root-mean-square norms on a GPU: one pass forward, one backward.

Letters as in `blocked.py`. A program takes some tokens of one group. Inputs are `(B, L, D)` with any stride between
tokens and between rows; what is written is contiguous. The gradient of the weight is summed by every program for its
own tokens, and then over programs, both in an order that only the device decides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture, launch, num_processors
from ..tiles import tile

# Backward holds a group's channels in registers, and its share of the weight's gradient, up to this width.
MAX_CHANNELS_AT_ONCE = 4096


def norm_forward(
    x_BLD: Tensor, z_BLD: Tensor | None, weight_D: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """Return the output in the dtype of `x` and `1 / rms` per token and group, `(T, g)`."""
    y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    return y_BLD, _forward(y_BLD, None, x_BLD, None, z_BLD, weight_D, eps, group_size, norm_before_gate)


def add_norm_forward(x_BLD: Tensor, update_BLD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed sum in the dtype of `weight`, the sum in the wider dtype, and `1 / rms` of it, `(T, 1)`."""
    y_BLD = torch.empty_like(x_BLD, dtype=weight_D.dtype, memory_format=torch.contiguous_format)
    sum_dtype = torch.promote_types(x_BLD.dtype, update_BLD.dtype)
    sum_BLD = torch.empty_like(x_BLD, dtype=sum_dtype, memory_format=torch.contiguous_format)
    rstd_T1 = _forward(y_BLD, sum_BLD, x_BLD, update_BLD, None, weight_D, eps, len(weight_D), False)
    return y_BLD, sum_BLD, rstd_T1


def norm_backward(
    dy_BLD: Tensor, x_BLD: Tensor, z_BLD: Tensor | None, weight_D: Tensor, rstd_Tg: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, `z` (empty when there is no gate) and `weight`; `dy` is contiguous."""
    dx_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    dz_BLD = torch.empty_like(x_BLD[:0] if z_BLD is None else z_BLD, memory_format=torch.contiguous_format)
    dweight_D = _backward(dx_BLD, None, dz_BLD, dy_BLD, None, x_BLD, z_BLD, weight_D, rstd_Tg, norm_before_gate)
    return dx_BLD, dz_BLD, dweight_D


def add_norm_backward(
    dnormed_BLD: Tensor,
    dsum_BLD: Tensor | None,
    sum_BLD: Tensor,
    weight_D: Tensor,
    rstd_T1: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of `x`, of `update` (None where its dtype makes it that of `x`) and of `weight`.

    `dtypes` are those of `x` and `update`; all tensors are contiguous.
    """
    dx_BLD = torch.empty_like(sum_BLD, dtype=dtypes[0])
    dupdate_BLD = None if dtypes[0] == dtypes[1] else torch.empty_like(sum_BLD, dtype=dtypes[1])
    dweight_D = _backward(dx_BLD, dupdate_BLD, None, dnormed_BLD, dsum_BLD, sum_BLD, None, weight_D, rstd_T1, False)
    return dx_BLD, dupdate_BLD, dweight_D


def _forward(
    y_BLD: Tensor,
    sum_BLD: Tensor | None,
    x_BLD: Tensor,
    update_BLD: Tensor | None,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    B, L, D = x_BLD.shape
    groups = D // group_size
    rstd_Tg = torch.empty(B * L, groups, dtype=torch.float32, device=x_BLD.device)
    block = triton.next_power_of_2(group_size)
    choice = tile("norm_forward", architecture(x_BLD), str(max(block, 1024)))
    rows = max(1, choice["elements"] // block)
    launch(
        _norm_forward_kernel,
        (triton.cdiv(B * L, rows) * groups,),
        y_ptr=y_BLD,
        sum_ptr=sum_BLD,
        rstd_ptr=rstd_Tg,
        x_ptr=x_BLD,
        update_ptr=update_BLD,
        z_ptr=z_BLD,
        weight_ptr=weight_D.contiguous(),
        T=B * L,
        L=L,
        groups=groups,
        eps=eps,
        **_strides(x=x_BLD, update=update_BLD, z=z_BLD),
        NORM_BEFORE_GATE=norm_before_gate,
        GROUP_SIZE=group_size,
        ROWS=rows,
        BLOCK=block,
        num_warps=choice["num_warps"],
    )
    return rstd_Tg


def _backward(
    dx_BLD: Tensor,
    dupdate_BLD: Tensor | None,
    dz_BLD: Tensor | None,
    dy_BLD: Tensor,
    dsum_BLD: Tensor | None,
    x_BLD: Tensor,
    z_BLD: Tensor | None,
    weight_D: Tensor,
    rstd_Tg: Tensor,
    norm_before_gate: bool,
) -> Tensor:
    B, L, D = x_BLD.shape
    groups = rstd_Tg.shape[1]
    block = triton.next_power_of_2(D // groups)
    choice = tile("norm_backward", architecture(x_BLD), str(max(block, 1024)))
    if block > MAX_CHANNELS_AT_ONCE:
        kernel, block, rows = _wide_norm_backward_kernel, choice["block"], choice["rows"]
    else:
        kernel, rows = _norm_backward_kernel, max(1, choice["elements"] // block)
    programs = min(triton.cdiv(B * L, rows), max(1, choice["programs"] * num_processors(x_BLD) // groups))
    dweight_pD = torch.empty(programs, D, dtype=torch.float32, device=x_BLD.device)
    launch(
        kernel,
        (programs * groups,),
        dx_ptr=dx_BLD,
        dupdate_ptr=dupdate_BLD,
        dz_ptr=None if z_BLD is None else dz_BLD,
        dweight_ptr=dweight_pD,
        dy_ptr=dy_BLD,
        dsum_ptr=dsum_BLD,
        x_ptr=x_BLD,
        z_ptr=z_BLD,
        weight_ptr=weight_D.contiguous(),
        rstd_ptr=rstd_Tg,
        T=B * L,
        L=L,
        groups=groups,
        programs=programs,
        **_strides(x=x_BLD, z=z_BLD),
        NORM_BEFORE_GATE=norm_before_gate,
        GROUP_SIZE=D // groups,
        ROWS=rows,
        BLOCK=block,
        num_warps=choice["num_warps"],
    )
    return dweight_pD.sum(0).to(weight_D.dtype)


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_batch_stride"], found[f"{name}_stride"] = (0, 0) if tensor is None else tensor.stride()[:2]
    return found


@triton.jit
def _rows_of(ptr, row, L, batch_stride, stride):
    return ptr + ((row // L).to(tl.int64) * batch_stride + (row % L).to(tl.int64) * stride)[:, None]


@triton.jit
def _norm_forward_kernel(
    y_ptr,
    sum_ptr,
    rstd_ptr,
    x_ptr,
    update_ptr,
    z_ptr,
    weight_ptr,
    T,
    L,
    groups,
    eps,
    x_batch_stride,
    x_stride,
    update_batch_stride,
    update_stride,
    z_batch_stride,
    z_stride,
    NORM_BEFORE_GATE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (row < T)[:, None] & (channel < GROUP_SIZE)[None, :]
    column = (group * GROUP_SIZE + channel)[None, :]
    written = (row.to(tl.int64) * (groups * GROUP_SIZE))[:, None] + column

    u = tl.load(_rows_of(x_ptr, row, L, x_batch_stride, x_stride) + column, mask=inside, other=0.0).to(tl.float32)
    if update_ptr is not None:
        update_rows = _rows_of(update_ptr, row, L, update_batch_stride, update_stride)
        u += tl.load(update_rows + column, mask=inside, other=0.0).to(tl.float32)
        stored = u.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + written, stored, mask=inside)
        u = stored.to(tl.float32)
    if z_ptr is not None:
        z = tl.load(_rows_of(z_ptr, row, L, z_batch_stride, z_stride) + column, mask=inside, other=0.0).to(tl.float32)
        gate = z * tl.sigmoid(z)
        if not NORM_BEFORE_GATE:
            u *= gate
    rstd = tl.rsqrt(tl.sum(u * u, 1) / GROUP_SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=(channel < GROUP_SIZE)[None, :], other=0.0).to(tl.float32)
    y = u * rstd[:, None] * weight
    if z_ptr is not None and NORM_BEFORE_GATE:
        y *= gate
    tl.store(y_ptr + written, y, mask=inside)
    tl.store(rstd_ptr + row.to(tl.int64) * groups + group, rstd, mask=row < T)


@triton.jit
def _load_normed(dy_rows, x_rows, z_rows, rstd, column, inside, NORM_BEFORE_GATE: tl.constexpr):
    x = tl.load(x_rows + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_rows + column, mask=inside, other=0.0).to(tl.float32)
    u, gate, slope = x, x, x
    if z_rows is not None:
        z = tl.load(z_rows + column, mask=inside, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(z)
        gate, slope = z * open_, open_ * (1 + z * (1 - open_))
        if NORM_BEFORE_GATE:
            slope *= dy
            dy *= gate
        else:
            u = x * gate
    return x, u * rstd[:, None], dy, gate, slope


@triton.jit
def _store_gradients(
    dx_ptr, dupdate_ptr, dz_ptr, dsum_ptr, x, normed, dnormed, along, rstd, weight, gate, slope, written, inside,
    NORM_BEFORE_GATE: tl.constexpr,
):  # fmt: skip
    du = (dnormed - normed * along[:, None]) * rstd[:, None]
    if dz_ptr is not None:
        if NORM_BEFORE_GATE:
            tl.store(dz_ptr + written, slope * normed * weight, mask=inside)
        else:
            tl.store(dz_ptr + written, du * x * slope, mask=inside)
            du *= gate
    if dsum_ptr is not None:
        du += tl.load(dsum_ptr + written, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + written, du, mask=inside)
    if dupdate_ptr is not None:
        tl.store(dupdate_ptr + written, du, mask=inside)


@triton.jit
def _norm_backward_kernel(
    dx_ptr,
    dupdate_ptr,
    dz_ptr,
    dweight_ptr,
    dy_ptr,
    dsum_ptr,
    x_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    T,
    L,
    groups,
    programs,
    x_batch_stride,
    x_stride,
    z_batch_stride,
    z_stride,
    NORM_BEFORE_GATE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, program = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel = tl.arange(0, BLOCK)
    in_group = (channel < GROUP_SIZE)[None, :]
    column = (group * GROUP_SIZE + channel)[None, :]
    weight = tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, T, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < T)[:, None] & in_group
        written = (row.to(tl.int64) * (groups * GROUP_SIZE))[:, None] + column
        rstd = tl.load(rstd_ptr + row.to(tl.int64) * groups + group, mask=row < T, other=0.0)
        x_rows, z_rows = _rows_of(x_ptr, row, L, x_batch_stride, x_stride), None
        if z_ptr is not None:
            z_rows = _rows_of(z_ptr, row, L, z_batch_stride, z_stride)
        dy_rows = dy_ptr + (written - column)
        x, normed, dy, gate, slope = _load_normed(dy_rows, x_rows, z_rows, rstd, column, inside, NORM_BEFORE_GATE)
        dweight += dy * normed
        dnormed = dy * weight
        along = tl.sum(normed * dnormed, 1) / GROUP_SIZE
        _store_gradients(
            dx_ptr, dupdate_ptr, dz_ptr, dsum_ptr, x, normed, dnormed, along, rstd, weight, gate, slope, written,
            inside, NORM_BEFORE_GATE,
        )  # fmt: skip
    partial = dweight_ptr + program.to(tl.int64) * (groups * GROUP_SIZE) + group * GROUP_SIZE + channel
    tl.store(partial, tl.sum(dweight, 0), mask=channel < GROUP_SIZE)


@triton.jit
def _wide_norm_backward_kernel(
    dx_ptr,
    dupdate_ptr,
    dz_ptr,
    dweight_ptr,
    dy_ptr,
    dsum_ptr,
    x_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    T,
    L,
    groups,
    programs,
    x_batch_stride,
    x_stride,
    z_batch_stride,
    z_stride,
    NORM_BEFORE_GATE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A group is read twice, block by block, the second time from cache; so is the program's own sum for the weight.
    group, program = tl.program_id(0) % groups, tl.program_id(0) // groups
    partial = dweight_ptr + program.to(tl.int64) * (groups * GROUP_SIZE) + group * GROUP_SIZE
    for first in range(program * ROWS, T, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        rstd = tl.load(rstd_ptr + row.to(tl.int64) * groups + group, mask=row < T, other=0.0)
        x_rows, z_rows = _rows_of(x_ptr, row, L, x_batch_stride, x_stride), None
        if z_ptr is not None:
            z_rows = _rows_of(z_ptr, row, L, z_batch_stride, z_stride)
        written_rows = (row.to(tl.int64) * (groups * GROUP_SIZE))[:, None]
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, GROUP_SIZE, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            inside = (row < T)[:, None] & (channel < GROUP_SIZE)[None, :]
            column = (group * GROUP_SIZE + channel)[None, :]
            weight = tl.load(weight_ptr + column, mask=(channel < GROUP_SIZE)[None, :], other=0.0).to(tl.float32)
            x, normed, dy, gate, slope = _load_normed(
                dy_ptr + written_rows, x_rows, z_rows, rstd, column, inside, NORM_BEFORE_GATE
            )
            products += normed * (dy * weight)
        along = tl.sum(products, 1) / GROUP_SIZE
        for start in range(0, GROUP_SIZE, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            inside = (row < T)[:, None] & (channel < GROUP_SIZE)[None, :]
            column = (group * GROUP_SIZE + channel)[None, :]
            weight = tl.load(weight_ptr + column, mask=(channel < GROUP_SIZE)[None, :], other=0.0).to(tl.float32)
            x, normed, dy, gate, slope = _load_normed(
                dy_ptr + written_rows, x_rows, z_rows, rstd, column, inside, NORM_BEFORE_GATE
            )
            # The first rows have nothing to add to: the memory is not initialised.
            known = tl.where(first >= programs * ROWS, GROUP_SIZE, 0)
            before = tl.load(partial + channel, mask=channel < known, other=0.0)
            tl.store(partial + channel, before + tl.sum(dy * normed, 0), mask=channel < GROUP_SIZE)
            _store_gradients(
                dx_ptr, dupdate_ptr, dz_ptr, dsum_ptr, x, normed, dy * weight, along, rstd, weight, gate, slope,
                written_rows + column, inside, NORM_BEFORE_GATE,
            )  # fmt: skip
        # What one thread has stored above, another may load for the next rows.
        tl.debug_barrier()
