"""A linear map of every expert on that expert's rows, as an operator with its own backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import asked_for, choose_backend
from .reference import grouped_linear_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The kernels number rows and tiles in 32 bits; what is reached from them is not.
MAX_FUSED_ROWS = 1 << 30


def grouped_linear(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply the rows of every expert by its matrix: row s of expert x is `weight[x] @ x[s]`.

    Args:
        x_SF: rows ordered by expert, float64, float32, bfloat16 or float16 (summed in float32).
        weight_XOF: in the dtype of `x`.
        ends_X: int32, not decreasing, from `expert_order`: expert x has the rows from `ends[x - 1]` to `ends[x]`.
        backend: as in `kernels.dispatch`, but `auto` takes PyTorch's grouped product where the GPU has one (Hopper and
            later; bfloat16 whose widths are multiples of 8). Neither that nor the Triton kernels wait for `ends`; for
            other dtypes and widths PyTorch's way reads them first.

    Returns:
        `(S, O)` in the dtype of `x`. Rows that no expert has are zero, so are their gradients and the gradient of an
        expert without rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
        IndexError: `ends` that decrease or pass S, on a CPU. On a GPU nobody looks.
    """
    if x_SF.dim() != 2 or weight_XOF.dim() != 3 or ends_X.dim() != 1:
        _refuse_shapes(x_SF, weight_XOF, ends_X)
    if weight_XOF.shape[0] == 0 or weight_XOF.shape[::2] != (len(ends_X), x_SF.shape[1]):
        _refuse_shapes(x_SF, weight_XOF, ends_X)
    if x_SF.dtype not in DTYPES or weight_XOF.dtype != x_SF.dtype or ends_X.dtype != torch.int32:
        dtypes = f"{x_SF.dtype}, {weight_XOF.dtype}, {ends_X.dtype}"
        raise ValueError(f"x, weight and ends are {dtypes}; give one float dtype, and torch.int32")
    if not x_SF.device == weight_XOF.device == ends_X.device:
        devices = f"{x_SF.device}, {weight_XOF.device}, {ends_X.device}"
        raise ValueError(f"x, weight and ends are on {devices}; give one device")
    obstacle = f"{len(x_SF)} rows are more than {MAX_FUSED_ROWS}" if len(x_SF) > MAX_FUSED_ROWS else None
    if asked_for(backend) == "auto" and _has_grouped_mm(x_SF, weight_XOF):
        backend = "torch"
    backend = choose_backend("grouped_linear", backend, x_SF, obstacle)
    if backend == "reference":
        return grouped_linear_reference(x_SF, weight_XOF, ends_X)
    return _grouped(x_SF, weight_XOF, ends_X, False, backend == "triton")


def _refuse_shapes(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor) -> None:
    shapes = tuple(x_SF.shape), tuple(weight_XOF.shape), tuple(ends_X.shape)
    raise ValueError(f"x, weight and ends have shapes {shapes}; give (S, F), (X, O, F), (X,), with X > 0")


@torch.library.custom_op("headrace::grouped_linear", mutates_args=())
def _grouped(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor, transposed: bool, fused: bool) -> Tensor:
    """`transposed`: by the transposes of the matrices, from O columns to F, as the gradient of `x` needs it."""
    if fused:
        from . import fused as kernels

        return kernels.grouped_linear(x_SF.contiguous(), weight_XOF.contiguous(), ends_X.contiguous(), transposed)
    weight_XFO = weight_XOF if transposed else weight_XOF.mT
    if _has_grouped_mm(x_SF, weight_XOF):
        y_SO = F.grouped_mm(x_SF.contiguous(), weight_XFO, offs=ends_X)
        nobody_S = torch.arange(len(x_SF), device=x_SF.device) >= ends_X[-1]
        return y_SO.masked_fill_(nobody_S[:, None], 0.0)
    y_SO = x_SF.new_empty(len(x_SF), weight_XFO.shape[2])
    spans = _spans(ends_X, len(x_SF))
    for weight_FO, rows in zip(weight_XFO, spans, strict=True):
        torch.mm(x_SF[rows], weight_FO, out=y_SO[rows])
    y_SO[spans[-1].stop :] = 0.0
    return y_SO


@_grouped.register_fake
def _(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor, transposed: bool, fused: bool) -> Tensor:
    return x_SF.new_empty(x_SF.shape[0], weight_XOF.shape[2 if transposed else 1])


@torch.library.custom_op("headrace::grouped_linear_weight_gradient", mutates_args=())
def _weight_gradient(dy_SO: Tensor, x_SF: Tensor, ends_X: Tensor, fused: bool) -> Tensor:
    if fused:
        from . import fused as kernels

        return kernels.grouped_weight_gradient(dy_SO.contiguous(), x_SF.contiguous(), ends_X.contiguous())
    if _has_grouped_mm(x_SF, dy_SO):
        dweight_XOF = F.grouped_mm(dy_SO.contiguous().mT, x_SF.contiguous(), offs=ends_X)
        empty_X = ends_X == torch.cat([ends_X.new_zeros(1), ends_X[:-1]])
        return dweight_XOF.masked_fill_(empty_X[:, None, None], 0.0)
    dweight_XOF = x_SF.new_empty(len(ends_X), dy_SO.shape[1], x_SF.shape[1])
    for dweight_OF, rows in zip(dweight_XOF, _spans(ends_X, len(x_SF)), strict=True):
        torch.mm(dy_SO[rows].t(), x_SF[rows], out=dweight_OF)
    return dweight_XOF


@_weight_gradient.register_fake
def _(dy_SO: Tensor, x_SF: Tensor, ends_X: Tensor, fused: bool) -> Tensor:
    return x_SF.new_empty(ends_X.shape[0], dy_SO.shape[1], x_SF.shape[1])


def _has_grouped_mm(*tensors: Tensor) -> bool:
    """Whether PyTorch multiplies such tensors group by group on their GPU, without asking where groups end.

    Its kernels are for Hopper and later and take bfloat16 whose rows begin at multiples of 16 bytes.
    """
    return all(
        t.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(t.device)[0] >= 9
        and t.dtype == torch.bfloat16
        and len(t) > 0
        and all(size > 0 and size % 8 == 0 for size in t.shape[1:])
        for t in tensors
    )


def _spans(ends_X: Tensor, num_rows: int) -> list[slice]:
    ends = ends_X.tolist()
    starts = [0, *ends[:-1]]
    if any(start > end for start, end in zip(starts, ends, strict=True)) or ends[-1] > num_rows:
        raise IndexError(
            f"ends are {ends} for {num_rows} rows; give ends that do not decrease, the last at most {num_rows}"
        )
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    x_SF, weight_XOF, ends_X, transposed, ctx.fused = inputs
    assert not transposed, "what is itself a gradient has none"
    ctx.save_for_backward(x_SF, weight_XOF, ends_X)


def _backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x_SF, weight_XOF, ends_X = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    dx_SF = _grouped(dy_SO, weight_XOF, ends_X, True, ctx.fused) if of_x else None
    dweight_XOF = _weight_gradient(dy_SO, x_SF, ends_X, ctx.fused) if of_weight else None
    return dx_SF, dweight_XOF, None, None, None


_grouped.register_autograd(_backward, setup_context=_setup_context)
