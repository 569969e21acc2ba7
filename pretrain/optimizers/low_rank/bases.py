"""Orthonormal bases of subspaces, the same bits for the same whole matrix up to rounding: no sign is left to chance."""

import torch
from torch import Tensor

from .layout import MatrixLayout

# Halko, Martinsson and Tropp, arXiv:0909.4061, section 4: a few directions more than asked for, and powers of G G^T.
OVERSAMPLING = 8
POWERS = 2


def sketch_size(rank: int, short: int) -> int:
    """Columns of the test matrix of a randomised singular value decomposition."""
    return min(rank + OVERSAMPLING, short)


def leading_directions(layout: MatrixLayout, grad_xsl: Tensor, rank: int, test_XLk: Tensor) -> Tensor:
    """The leading left singular vectors of each whole gradient, `(x, S, rank)` on every rank. Collective.

    Randomised (arXiv:0909.4061, algorithms 4.4 and 5.1): only products with k columns travel, never a gradient.
    """
    test_xlk = test_XLk[layout.own_stack][:, layout.own_long]
    q_xSk = orthonormal(layout.whole_short(layout.long.sum(grad_xsl @ test_xlk)))
    for _ in range(POWERS):
        back_xlk = layout.short.sum(grad_xsl.mT @ q_xSk[:, layout.own_short])
        q_xSk = orthonormal(layout.whole_short(layout.long.sum(grad_xsl @ back_xlk)))
    small_xkl = layout.short.sum(q_xSk[:, layout.own_short].mT @ grad_xsl).double()
    # Singular vectors of a wide matrix as eigenvectors of its Gram matrix: squares need the wider dtype.
    vectors_xkk = torch.linalg.eigh(layout.long.sum(small_xkl @ small_xkl.mT))[1].to(grad_xsl.dtype)
    return _with_signs(q_xSk @ vectors_xkk[..., -rank:].flip(-1))


def orthonormal(matrices: Tensor) -> Tensor:
    """Q of the QR decomposition in which R has a diagonal that is not negative, as if by Gram and Schmidt."""
    q, r = torch.linalg.qr(matrices)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)[..., None, :]


def _with_signs(vectors: Tensor) -> Tensor:
    """Columns whose entry of largest size is positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
