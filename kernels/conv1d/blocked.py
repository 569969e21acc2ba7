"""The causal depthwise convolution on `(B, L, D)`, block by block of time: one pass over memory, fused SiLU.

A block adds one shifted product per tap. Rows whose tap would reach into an earlier document are put back to what
they were after that tap: nothing is multiplied by zero, so not even a NaN crosses a document start. The backward
pass computes the pre-activation again and keeps nothing but the inputs.
"""

import torch
from torch import Tensor

from ..numerics import blocks, compute_dtype

Rows = tuple[Tensor, Tensor]


def _halo(x_BLD: Tensor, initial_state: Tensor | None, K: int) -> Tensor:
    if initial_state is None:
        return x_BLD.new_zeros(x_BLD.shape[0], K - 1, x_BLD.shape[2])
    return initial_state.to(x_BLD.dtype)


def _window(x_BLD: Tensor, halo: Tensor, block: slice) -> Tensor:
    """Return the inputs a block's outputs see, `(B, K - 1 + rows, D)`, in the dtype of sums."""
    reach = halo.shape[1]
    if block.start == 0:
        return torch.cat([halo, x_BLD[:, : block.stop]], dim=1).to(compute_dtype(x_BLD))
    return x_BLD[:, block.start - reach : block.stop].to(compute_dtype(x_BLD))


def _documents(reset: Tensor, K: int) -> Tensor:
    """Number the documents of `(B, K - 1 + L)` inputs; the halo belongs to document 0."""
    return torch.nn.functional.pad(reset.cumsum(1), (K - 1, 0))


def _rows_cut_off(reset: Tensor | None, K: int, parts: list[slice]) -> list[list[Rows | None]]:
    """Find, for each block and each shift below K, the outputs `(row, time)` whose input that far back is cut off.

    An input is cut off when it belongs to another document; times count from the start of the block, None stands for
    no outputs.
    """
    found: list[list[Rows | None]] = [[None] * K for _ in parts]
    if reset is None:
        return found
    document = _documents(reset, K)
    L = reset.shape[1]
    starts = torch.tensor([part.start for part in parts] + [L], device=reset.device)
    for shift in range(1, K):
        differs = document[:, K - 1 :] != document[:, K - 1 - shift : K - 1 - shift + L]
        time, row = differs.t().nonzero(as_tuple=True)
        bounds = torch.searchsorted(time, starts).tolist()
        for number, part in enumerate(parts):
            low, high = bounds[number : number + 2]
            if low < high:
                found[number][shift] = row[low:high], time[low:high] - part.start
    return found


def _cut_off_state(reset: Tensor, K: int) -> Tensor:
    """Mark those of the last K - 1 inputs, `(B, K - 1)`, that do not belong to the last token's document."""
    document = _documents(reset, K)
    return document[:, reset.shape[1] :] != document[:, -1:]


def _pre_activation(window: Tensor, weight_KD: Tensor, bias_D: Tensor | None, cut_off: list[Rows | None]) -> Tensor:
    K = weight_KD.shape[0]
    length = window.shape[1] - K + 1
    now = window[:, K - 1 :]
    pre = now * weight_KD[-1] if bias_D is None else torch.addcmul(bias_D.to(now.dtype), now, weight_KD[-1])
    for shift in range(1, K):
        tap = K - 1 - shift
        rows = cut_off[shift]
        if rows is None:
            pre.addcmul_(window[:, tap : tap + length], weight_KD[tap])
            continue
        without = pre[rows]
        pre.addcmul_(window[:, tap : tap + length], weight_KD[tap])
        pre[rows] = without
    return pre


def conv1d_forward(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return `y_BLD` and the final state; arguments as in `causal_conv1d`."""
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    halo = _halo(x_BLD, initial_state, K)
    parts = list(blocks(L, B * D, max(K, 16)))
    weight_KD = weight_DK.to(compute_dtype(x_BLD)).t().contiguous()
    y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    for block, cut_off in zip(parts, _rows_cut_off(reset, K, parts), strict=True):
        pre = _pre_activation(_window(x_BLD, halo, block), weight_KD, bias_D, cut_off)
        y_BLD[:, block] = torch.nn.functional.silu(pre, inplace=True) if silu else pre
    last_inputs = torch.cat([halo, x_BLD[:, max(0, L - K + 1) :]], dim=1)[:, min(L, K - 1) :]
    if reset is not None:
        last_inputs = last_inputs.masked_fill(_cut_off_state(reset, K)[..., None], 0.0)
    return y_BLD, last_inputs.clone(memory_format=torch.contiguous_format)


def conv1d_backward(
    dy_BLD: Tensor | None,
    dfinal: Tensor | None,
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `x, weight, bias, initial_state`, the last two also when those are None."""
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    dtype = compute_dtype(x_BLD)
    halo = _halo(x_BLD, initial_state, K)
    parts = list(blocks(0 if dy_BLD is None else L, B * D, max(K, 16)))
    dinputs = torch.zeros(B, K - 1 + L, D, dtype=dtype, device=x_BLD.device)
    dweight_KD = torch.zeros(K, D, dtype=dtype, device=x_BLD.device)
    dbias_D = torch.zeros(D, dtype=dtype, device=x_BLD.device)
    weight_KD = weight_DK.to(dtype).t().contiguous()
    for block, cut_off in zip(parts, _rows_cut_off(reset, K, parts), strict=True):
        assert dy_BLD is not None
        window = _window(x_BLD, halo, block)
        dpre = dy_BLD[:, block].to(dtype)
        if silu:
            dpre = torch.ops.aten.silu_backward(dpre, _pre_activation(window, weight_KD, bias_D, cut_off))
        elif reset is not None:
            dpre = dpre.clone()
        dbias_D += dpre.sum((0, 1))
        length = block.stop - block.start
        for shift in range(K):
            if (rows := cut_off[shift]) is not None:
                dpre[rows] = 0.0  # and for all larger shifts, which reach into that other document too
            tap = K - 1 - shift
            dweight_KD[tap] += (dpre * window[:, tap : tap + length]).sum((0, 1))
            dinputs[:, block.start + tap : block.stop + tap].addcmul_(dpre, weight_KD[tap])
    if dfinal is not None:
        if reset is not None:
            dfinal = dfinal.masked_fill(_cut_off_state(reset, K)[..., None], 0.0)
        dinputs[:, L:] += dfinal
    dx_BLD = dinputs[:, K - 1 :].to(x_BLD.dtype).contiguous()
    dweight_DK = dweight_KD.t().to(weight_DK.dtype).contiguous()
    dbias = dbias_D.to(weight_DK.dtype if bias_D is None else bias_D.dtype)
    dinitial = dinputs[:, : K - 1].to(x_BLD.dtype if initial_state is None else initial_state.dtype).clone()
    return dx_BLD, dweight_DK, dbias, dinitial
