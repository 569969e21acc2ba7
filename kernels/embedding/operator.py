"""The embedding as an operator: its backward adds the gradients of equal tokens in the order of the tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import choose_backend
from ..numerics import compute_dtype
from .reference import embedding_reference


def embedding(tokens: Tensor, weight_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """Take the rows of `weight` that `tokens` number.

    `tokens` are int64 or int32 of any shape, `weight` is `(V, D)` in float64, float32, bfloat16 or float16. A row's
    gradient is summed in float32 (float64 for float64), without atomic additions, in an order that only the tokens
    decide: it is the same bits every time. `backend` as in `kernels.dispatch`.

    Raises:
        ValueError: other dtypes of `tokens`, a `weight` that has not two dimensions, a backend that cannot run.
        IndexError: a token outside [0, V), on a CPU. On a GPU the operator does not check: PyTorch's lookup stops by a
            device-side assertion, and backward leaves such tokens out.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens are {tokens.dtype}; give int64 or int32")
    if weight_VD.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight_VD.shape)}; give (V, D)")
    backend = choose_backend("embedding", backend, weight_VD)
    if backend == "reference":
        return embedding_reference(tokens, weight_VD)
    return _embedding(tokens, weight_VD, backend == "triton")


@torch.library.custom_op("headrace::embedding", mutates_args=())
def _embedding(tokens: Tensor, weight_VD: Tensor, fused: bool) -> Tensor:
    return F.embedding(tokens, weight_VD)


@_embedding.register_fake
def _(tokens: Tensor, weight_VD: Tensor, fused: bool) -> Tensor:
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@torch.library.custom_op("headrace::embedding_backward", mutates_args=())
def _embedding_backward(dy: Tensor, tokens: Tensor, rows: int, fused: bool) -> Tensor:
    dy_TD, tokens_T = dy.reshape(-1, dy.shape[-1]), tokens.flatten()
    if fused:
        from .fused import embedding_backward

        return embedding_backward(dy_TD.contiguous(), tokens_T, rows)
    return _sum_of_equal_tokens(dy_TD, tokens_T, rows)


@_embedding_backward.register_fake
def _(dy: Tensor, tokens: Tensor, rows: int, fused: bool) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


def _sum_of_equal_tokens(dy_TD: Tensor, tokens_T: Tensor, rows: int) -> Tensor:
    # PyTorch's own sum keeps to the order of the tokens, but adds in the dtype of the gradients.
    sum_by_row = torch.ops.aten.embedding_dense_backward
    dtype = compute_dtype(dy_TD)
    if dtype == dy_TD.dtype:
        return sum_by_row(dy_TD, tokens_T, rows, -1, False)
    present, index_T = tokens_T.unique(return_inverse=True)
    dweight_VD = dy_TD.new_zeros(rows, dy_TD.shape[1])
    dweight_VD[present] = sum_by_row(dy_TD.to(dtype), index_T, len(present), -1, False).to(dy_TD.dtype)
    return dweight_VD


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    tokens, weight_VD, ctx.fused = inputs
    ctx.rows = weight_VD.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
    return None, _embedding_backward(dy, *ctx.saved_tensors, ctx.rows, ctx.fused), None


_embedding.register_autograd(_backward, setup_context=_setup_context)
