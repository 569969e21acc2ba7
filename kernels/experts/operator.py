"""The order of tokens by expert, and the way there and back, as operators with their own backward.

Letters: `T` tokens, `k` copies of a token, `S` rows ordered by expert, `X` experts, `D` columns. Nothing is added by
atomics and nothing waits for the device: the same inputs give the same bits, and a GPU's queue never runs empty.
"""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend
from ..numerics import compute_dtype
from .reference import expert_order_reference, permute_reference, unpermute_reference
from .rows import combine_rows, order_copies, products_of_rows, spread_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expert_order(experts_Tk: Tensor, num_experts: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Order the copies of tokens by expert, by token within an expert, then by j.

    Args:
        experts_Tk: the expert of copy j of token t, int64 in [0, X), or -1 for no copy.
        num_experts: X.
        backend: as in `kernels.dispatch`.

    Returns:
        The row of every copy, int64 `(T, k)`, -1 where there is no copy; and int32 `(X,)`: expert x has the rows from
        the end of expert x - 1 to its own. Neither has a gradient.

    Raises:
        ValueError: other dtypes or shapes, fewer than one expert, 2^31 copies or more, a backend that cannot run.
        IndexError: an expert outside [-1, X), on a CPU. On a GPU nobody looks, and it counts as no copy.
    """
    if experts_Tk.dim() != 2 or experts_Tk.dtype != torch.int64:
        raise ValueError(f"experts are {experts_Tk.dtype} of shape {tuple(experts_Tk.shape)}; give torch.int64, (T, k)")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} is not positive")
    if experts_Tk.numel() >= 1 << 31:
        raise ValueError(f"{experts_Tk.numel()} copies of tokens are too many for int32; give fewer than 2^31")
    # The kernels sort integers, whatever the dtype of the tokens: only the device decides.
    backend = choose_backend("expert_order", backend, experts_Tk.new_empty(0, dtype=torch.float32))
    if backend == "reference":
        return expert_order_reference(experts_Tk, num_experts)
    return _expert_order(experts_Tk, num_experts, backend == "triton")


@torch.library.custom_op("headrace::expert_order", mutates_args=())
def _expert_order(experts_Tk: Tensor, num_experts: int, fused: bool) -> tuple[Tensor, Tensor]:
    if fused:
        from . import fused as kernels

        return kernels.order_copies(experts_Tk, num_experts)
    return order_copies(experts_Tk, num_experts)


@_expert_order.register_fake
def _(experts_Tk: Tensor, num_experts: int, fused: bool) -> tuple[Tensor, Tensor]:
    return experts_Tk.new_empty(experts_Tk.shape), experts_Tk.new_empty(num_experts, dtype=torch.int32)


def permute(x_TD: Tensor, place_Tk: Tensor, num_rows: int, *, backend: str = "auto") -> Tensor:
    """Copy every token to its rows: row `place[t, j]` of the result is `x[t]`, rows that nobody names are zero.

    Args:
        x_TD: float64, float32, bfloat16 or float16.
        place_Tk: int64, from `expert_order`: each row at most once, or -1 for no copy.
        num_rows: S, the rows of the result; may be more than there are copies.
        backend: as in `kernels.dispatch`.

    Returns:
        `(S, D)` in the dtype of `x`. The gradient of `x[t]` is the sum of its rows' in order of j, added up in float32
        (float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
        IndexError: a place outside [-1, S), on a CPU. On a GPU nobody looks.
    """
    _check_rows("x", x_TD, place_Tk)
    if len(x_TD) != len(place_Tk):
        raise ValueError(f"x has {len(x_TD)} tokens and place {len(place_Tk)}; give (T, D) and (T, k)")
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows} is negative")
    backend = choose_backend("permute", backend, x_TD)
    if backend == "reference":
        return permute_reference(x_TD, place_Tk, num_rows)
    return _permute(x_TD, place_Tk, num_rows, backend == "triton")


@torch.library.custom_op("headrace::permute", mutates_args=())
def _permute(x_TD: Tensor, place_Tk: Tensor, num_rows: int, fused: bool) -> Tensor:
    if fused:
        from . import fused as kernels

        return kernels.spread_rows(x_TD.contiguous(), place_Tk.contiguous(), num_rows)
    return spread_rows(x_TD, None, place_Tk, num_rows)


@_permute.register_fake
def _(x_TD: Tensor, place_Tk: Tensor, num_rows: int, fused: bool) -> Tensor:
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@torch.library.custom_op("headrace::permute_backward", mutates_args=())
def _permute_backward(dout_SD: Tensor, place_Tk: Tensor, fused: bool) -> Tensor:
    if fused:
        from . import fused as kernels

        return kernels.combine_rows(dout_SD.contiguous(), None, place_Tk.contiguous())
    return combine_rows(dout_SD, None, place_Tk)


@_permute_backward.register_fake
def _(dout_SD: Tensor, place_Tk: Tensor, fused: bool) -> Tensor:
    return dout_SD.new_empty(place_Tk.shape[0], dout_SD.shape[1])


def _setup_permute(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    _, place_Tk, _, ctx.fused = inputs
    ctx.save_for_backward(place_Tk)


def _differentiate_permute(ctx: Any, dout_SD: Tensor) -> tuple[Tensor, None, None, None]:
    return _permute_backward(dout_SD, *ctx.saved_tensors, ctx.fused), None, None, None


_permute.register_autograd(_differentiate_permute, setup_context=_setup_permute)


def unpermute(y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor, *, backend: str = "auto") -> Tensor:
    """Add up the rows of every token, each times its weight: `out[t] = sum_j weight[t, j] * y[place[t, j]]`.

    Args:
        y_SD: float64, float32, bfloat16 or float16.
        weight_Tk: float32, or float64 where `y` is.
        place_Tk: int64, from `expert_order`: each row at most once, or -1 for no copy, which adds nothing.
        backend: as in `kernels.dispatch`.

    Returns:
        `(T, D)`, summed in order of j in float32 (float64), then rounded to the dtype of `y`. Gradients flow to `y` and
        `weight`; rows that nobody names, and weights of no copy, get zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
        IndexError: a place outside [-1, S), on a CPU. On a GPU nobody looks.
    """
    _check_rows("y", y_SD, place_Tk)
    if weight_Tk.shape != place_Tk.shape or weight_Tk.device != place_Tk.device:
        kinds = [f"{tuple(t.shape)} on {t.device}" for t in (weight_Tk, place_Tk)]
        raise ValueError(f"weight is {kinds[0]} and place is {kinds[1]}; give (T, k) twice, on one device")
    if weight_Tk.dtype != compute_dtype(y_SD):
        raise ValueError(f"weight is {weight_Tk.dtype} for rows in {y_SD.dtype}; give {compute_dtype(y_SD)}")
    backend = choose_backend("unpermute", backend, y_SD)
    if backend == "reference":
        return unpermute_reference(y_SD, weight_Tk, place_Tk)
    return _unpermute(y_SD, weight_Tk, place_Tk, backend == "triton")


@torch.library.custom_op("headrace::unpermute", mutates_args=())
def _unpermute(y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor, fused: bool) -> Tensor:
    if fused:
        from . import fused as kernels

        return kernels.combine_rows(y_SD.contiguous(), weight_Tk.contiguous(), place_Tk.contiguous())
    return combine_rows(y_SD, weight_Tk, place_Tk)


@_unpermute.register_fake
def _(y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor, fused: bool) -> Tensor:
    return y_SD.new_empty(place_Tk.shape[0], y_SD.shape[1])


@torch.library.custom_op("headrace::unpermute_backward", mutates_args=())
def _unpermute_backward(
    dout_TD: Tensor, y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    if fused:
        from . import fused as kernels

        tensors = (dout_TD, y_SD, weight_Tk, place_Tk)
        return kernels.unpermute_backward(*(t.contiguous() for t in tensors))
    dy_SD = spread_rows(dout_TD, weight_Tk, place_Tk, len(y_SD))
    return dy_SD, products_of_rows(dout_TD, y_SD, place_Tk)


@_unpermute_backward.register_fake
def _(dout_TD: Tensor, y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return y_SD.new_empty(y_SD.shape), weight_Tk.new_empty(weight_Tk.shape)


def _setup_unpermute(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.fused = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_unpermute(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_unpermute_backward(dout_TD, *ctx.saved_tensors, ctx.fused), None, None


_unpermute.register_autograd(_differentiate_unpermute, setup_context=_setup_unpermute)


def _check_rows(name: str, rows: Tensor, place_Tk: Tensor) -> None:
    if rows.dim() != 2 or place_Tk.dim() != 2:
        shapes = tuple(rows.shape), tuple(place_Tk.shape)
        raise ValueError(f"{name} and place have shapes {shapes}; give two dimensions each")
    if rows.dtype not in DTYPES or place_Tk.dtype != torch.int64:
        raise ValueError(f"{name} is {rows.dtype} and place is {place_Tk.dtype}; give a float dtype and torch.int64")
    if rows.device != place_Tk.device:
        raise ValueError(f"{name} is on {rows.device} and place is on {place_Tk.device}; give one device")
