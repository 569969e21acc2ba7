"""How the chunked SSD path lays out its work: chunks, decays within a chunk, blocks of chunks, groups of heads.

Letters beyond the house's: `n` chunks of all rows together, or of one block of them; `h` heads of one group. A
matrix product over a whole group has `h * P` columns, so that heads share their group's B and C.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics import compute_dtype

# Elements in the `Q x Q` matrices of all heads of a block of chunks.
BLOCK_ELEMENTS = 1 << 18

# Decays below this power of two become zero, or this power within chunks. They would be lost in rounding anyway, and
# their products with gradients would be denormal numbers, with which a processor computes many times slower.
SMALLEST_LOG2 = {torch.float32: -64.0, torch.float64: -900.0}


class Chunks(NamedTuple):
    """Inputs cut into chunks of equal length: shapes `(n, Q, ...)`, and how many chunks a row has."""

    x_nQHP: Tensor
    dt_nQH: Tensor
    B_nGQN: Tensor
    C_nGQN: Tensor | None
    reset_nQ: Tensor | None
    num_rows: int

    @property
    def per_row(self) -> int:
        """Number of chunks in one row of the batch."""
        return self.x_nQHP.shape[0] // self.num_rows

    def projections(self, block: slice) -> tuple[Tensor, Tensor]:
        """Return B and C of a block of chunks, `(n * G, Q, N)` each."""
        assert self.C_nGQN is not None
        return self.B_nGQN[block].flatten(0, 1), self.C_nGQN[block].flatten(0, 1)

    def blocks(self) -> Iterator[slice]:
        """Yield slices of chunks whose `Q x Q` matrices of all heads stay within the processor's cache."""
        n, Q, H, P = self.x_nQHP.shape
        step = max(1, BLOCK_ELEMENTS // (H * Q * max(Q, P)))
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))


def chunk_length(L: int, P: int, N: int, at_most: int) -> int:
    """Choose the chunk length: work within chunks grows with it, work on the states between them shrinks."""
    best = 32 if P * N <= 2048 else 64
    return min(best, at_most, L)


def cut_into_chunks(
    x_BLHP: Tensor, dt_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor | None, reset_BL: Tensor | None, chunk_size: int
) -> Chunks:
    """Cut a batch into chunks, padded at the end of each row by tokens with a step size of zero, which do nothing."""
    B, L, _, P = x_BLHP.shape
    dtype = compute_dtype(x_BLHP)
    Q = chunk_length(L, P, B_BLGN.shape[3], chunk_size)

    def cut_by_group(value: Tensor) -> Tensor:
        return cut(value, Q).transpose(1, 2).to(dtype).contiguous()

    C = None if C_BLGN is None else cut_by_group(C_BLGN)
    reset = None if reset_BL is None else cut(reset_BL, Q)
    return Chunks(cut(x_BLHP, Q), cut(dt_BLH, Q).to(dtype), cut_by_group(B_BLGN), C, reset, B)


def cut(value_BL: Tensor, Q: int) -> Tensor:
    """Cut `(B, L, ...)` into chunks `(n, Q, ...)`, the last of each row padded with zeros."""
    if value_BL.stride(-1) != 1:  # every pass over it would be slow
        value_BL = value_BL.contiguous()
    if value_BL.shape[1] % Q:
        value_BL = F.pad(value_BL, (0, 0) * (value_BL.dim() - 2) + (0, -value_BL.shape[1] % Q))
    return value_BL.reshape(-1, Q, *value_BL.shape[2:])


class Decays(NamedTuple):
    """Decay factors of all chunks, exact zeros across document starts.

    Between tokens j <= q of a chunk the factor is `2^(log_q - log_j)`. Its logarithms are summed in float64 and kept
    as a rounded value `log2_nHQ` and two factors near 1, `fix_row_nQH` and `fix_col_nQH`, that undo the rounding: the
    float32 result is then as good as multiplying the steps one by one.
    """

    log2_nHQ: Tensor
    fix_row_nQH: Tensor
    fix_col_nQH: Tensor
    sees_nQQ: Tensor  # float64, 1 where token q sees token j, 0 elsewhere; n is 1 when nothing is reset
    into_nQH: Tensor  # from the state entering the chunk to token q
    out_nQH: Tensor  # from token j to the state leaving the chunk
    through_nH: Tensor  # from the state entering the chunk to the state leaving it

    def visible(self, block: slice, G: int) -> Tensor:
        """Return which token sees which in a block of chunks, as ones and zeros `(n * G, Q, Q)` or `(1, Q, Q)`."""
        if self.sees_nQQ.shape[0] == 1:
            return self.sees_nQQ.to(self.log2_nHQ.dtype)
        return self.sees_nQQ[block].to(self.log2_nHQ.dtype).repeat_interleave(G, dim=0)


def compute_decays(dt_nQH: Tensor, A_H: Tensor, reset_nQ: Tensor | None) -> Decays:
    """Compute the decay factors of all chunks from step sizes and `A`."""
    Q, dtype = dt_nQH.shape[1], dt_nQH.dtype
    sees = torch.ones(Q, Q, dtype=torch.bool, device=dt_nQH.device).tril()[None]
    if reset_nQ is not None:
        document_nQ = reset_nQ.cumsum(1)
        sees = sees & (document_nQ[:, :, None] == document_nQ[:, None, :])
    sees_nQQ = sees.double()
    # Sums start anew at each document, by exact zeros: nothing of a document reaches another one, not even rounding.
    # A step of 2^-1024 is zero in every dtype: larger ones would only cost their neighbours digits.
    log2_nQH = sees_nQQ @ (dt_nQH.double() * (A_H.double() / math.log(2))).clamp_(min=-1024.0)
    into, through = _power_of_two(log2_nQH, dtype), _power_of_two(log2_nQH[:, -1], dtype)
    out = _power_of_two(log2_nQH[:, -1:] - log2_nQH, dtype)
    if reset_nQ is not None:
        into = into.masked_fill((document_nQ != 0)[..., None], 0.0)
        out = out.masked_fill((document_nQ != document_nQ[:, -1:])[..., None], 0.0)
        through = through.masked_fill(document_nQ[:, -1:] != 0, 0.0)
    rounded_nQH = log2_nQH.to(dtype)
    error_nQH = log2_nQH - rounded_nQH
    return Decays(
        log2_nHQ=rounded_nQH.transpose(1, 2).contiguous(),
        fix_row_nQH=error_nQH.exp2().to(dtype),
        fix_col_nQH=error_nQH.neg().exp2().to(dtype),
        sees_nQQ=sees_nQQ,
        into_nQH=into,
        out_nQH=out,
        through_nH=through,
    )


def _power_of_two(log2: Tensor, dtype: torch.dtype) -> Tensor:
    return log2.exp2().masked_fill_(log2 < SMALLEST_LOG2[dtype], 0.0).to(dtype)


def decay_matrix(decays: Decays, block: slice) -> Tensor:
    """Return `2^(log_q - log_j)` for all pairs of tokens, `(n, H, Q, Q)`; meaningless where q does not see j."""
    log2_nHQ = decays.log2_nHQ[block]
    smallest = SMALLEST_LOG2[log2_nHQ.dtype]
    return (log2_nHQ[..., :, None] - log2_nHQ[..., None, :]).clamp_(smallest, 0.0).exp2_()


def scale_by_group(x_nQHP: Tensor, scale_nQH: Tensor, G: int) -> Tensor:
    """Return `x * scale` laid out as `(n * G, Q, h * P)`, in the dtype of `scale`."""
    n, Q, H, P = x_nQHP.shape
    out = scale_nQH.new_empty(n, G, Q, H // G, P)
    x_nGQhP = x_nQHP.unflatten(2, (G, -1)).transpose(1, 2)
    torch.mul(x_nGQhP, scale_nQH.unflatten(2, (G, -1)).transpose(1, 2)[..., None], out=out)
    return out.view(n * G, Q, -1)


def scale_by_head(x_nQHP: Tensor, scale_nQH: Tensor) -> Tensor:
    """Return `x * scale` laid out as `(n * H, Q, P)`, in the dtype of `scale`."""
    n, Q, H, P = x_nQHP.shape
    out = scale_nQH.new_empty(n, H, Q, P)
    torch.mul(x_nQHP.transpose(1, 2), scale_nQH.transpose(1, 2)[..., None], out=out)
    return out.view(n * H, Q, P)


def group_to_tokens(value: Tensor, n: int, H: int) -> Tensor:
    """Return `(n * G, Q, h * P)` as `(n, Q, H, P)`, the inverse of `scale_by_group`; a view when G is 1."""
    G = value.shape[0] // n
    return value.view(n, G, value.shape[1], H // G, -1).transpose(1, 2).flatten(2, 3)
