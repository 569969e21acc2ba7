"""The seams of recurrent mixers under context parallelism: a convolution with halos, a scan with passed states.

No activation is moved for a recurrence: a segment gets the state that enters it, whose size does not depend on the
number of tokens. What holds for one process holds here: a context without segments runs the plain operator.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import causal_conv1d, selective_scan, selective_scan_summary
from ..kernels.affine import DIAGONAL, SCALAR, Transition
from ..kernels.ssd.exchange import Pending
from ..kernels.ssd.segmented import ssd_segments
from ..model.mixers import mamba1, mamba2
from ..model.mixers.mamba2 import ScanInputs
from ..model.sequence import SequenceContext
from .context import SegmentedContext
from .exchange import StateExchange
from .halo import halo_is_cut_off, halos


def scan(
    inputs: ScanInputs, chunk_size: int, past: Tensor | None, seq: SequenceContext, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The seam `scan` of Mamba-2. Collective over the context-parallel axis; no final state is returned then."""
    if not isinstance(seq, SegmentedContext):
        return mamba2.scan(inputs, chunk_size, past, seq, layer)
    y_BLHP = ssd_segments(
        *inputs,
        segments=[seq.layout.place(s) for s in seq.segments],
        exchange=RememberedExchange(seq, ("ssd", layer), SCALAR),
        reset=seq.reset_BL,
        chunk_size=chunk_size,
    )
    return y_BLHP, None


def selective_scan_over_segments(
    inputs: mamba1.ScanInputs, past: Tensor | None, seq: SequenceContext, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The seam `scan` of Mamba-1. Collective over the context-parallel axis; no final state is returned then.

    Two passes over the tokens: a segment's summary, and its outputs from the state that enters it.
    """
    if not isinstance(seq, SegmentedContext):
        return mamba1.scan(inputs, past, seq, layer)
    x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I = inputs
    lengths = seq.layout.lengths(seq.rank)
    by_segment = zip(*(t.split(lengths, 1) for t in (x_BLI, dt_BLI, B_BLN, C_BLN)), strict=True)
    segments = [
        (x, dt, B, C, None if seq.reset_BL is None else seq.reset_BL[:, seq.layout.place(segment)])
        for segment, (x, dt, B, C) in zip(seq.segments, by_segment, strict=True)
    ]
    summaries = [selective_scan_summary(x, dt, A_IN, B, reset=reset) for x, dt, B, _, reset in segments]
    exchange = RememberedExchange(seq, ("ssm", layer), DIAGONAL)
    entering = EnteringStates.apply(exchange, *(M for M, _ in summaries), *(S for _, S in summaries))
    parts = [
        selective_scan(x, dt, A_IN, B, C, D_I, initial_state=state, reset=reset)[0]
        for (x, dt, B, C, reset), state in zip(segments, entering, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), None


def convolve(
    x_BLF: Tensor, weight_FK: Tensor, bias_F: Tensor | None, past: Tensor | None, seq: SequenceContext, layer: int
) -> tuple[Tensor, Tensor | None]:
    """The seam `conv` of Mamba-1 and 2: halos of K - 1 tokens travel point to point, their gradients travel back."""
    if not isinstance(seq, SegmentedContext):
        return mamba2.convolve(x_BLF, weight_FK, bias_F, past, seq, layer)
    reach = weight_FK.shape[1] - 1
    parts = []
    before = halos(x_BLF, seq, reach, 1, ("conv", layer))
    own = x_BLF.split(seq.layout.lengths(seq.rank), 1)
    for segment, halo_BKF, x_BSF in zip(seq.segments, before, own, strict=True):
        if (cut_off := halo_is_cut_off(seq, segment, reach)) is not None:
            halo_BKF = halo_BKF.masked_fill(cut_off[..., None], 0.0)
        reset = None if seq.reset_BL is None else seq.reset_BL[:, seq.layout.place(segment)]
        part, _ = causal_conv1d(x_BSF, weight_FK, bias_F, activation="silu", initial_state=halo_BKF, reset=reset)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), None


@dataclass(frozen=True)
class RememberedExchange:
    """The exchange of a layer's states, whose result recomputation gets without asking again."""

    seq: SegmentedContext
    key: Hashable
    transition: Transition

    def start(self, M: list[Tensor], S: list[Tensor], *, reverse: bool = False) -> Pending:
        """See `StateExchange.start`."""
        seq = self.seq
        exchange = StateExchange(
            seq.layout, seq.group, seq.config.cp_exchange, self.transition, on_one_machine=seq.on_one_machine
        )
        if reverse:
            return exchange.start(M, S, reverse=True)
        known: _Known | None = self.seq.recall(self.key)
        return _Kept(self, exchange.start(M, S)) if known is None else known


@dataclass(frozen=True)
class _Known:
    """What an exchange brought, and whether it had then: a recomputation works in the same order, to the same bits."""

    states: list[Tensor | None]
    done: bool

    def wait(self) -> list[Tensor | None]:
        return self.states


class _Kept:
    """An exchange under way whose result will be remembered."""

    def __init__(self, exchange: RememberedExchange, running: Pending) -> None:
        self.exchange, self.running, self.done = exchange, running, running.done

    def wait(self) -> list[Tensor | None]:
        known = _Known(self.running.wait(), self.done)
        return self.exchange.seq.remember(self.exchange.key, known).states


class EnteringStates(torch.autograd.Function):
    """The states that enter this rank's segments, for any operator that declares its transition class.

    `apply(exchange, *M, *S)` with one `M` and one `S` for each of this rank's segments, any exchange of the same
    transition class; returns one state each, zero where nothing enters. A mixer whose operator offers
    `summary(...) -> (M, S)` and an `initial_state` is context-parallel with

        y, _ = op(..., initial_state=EnteringStates.apply(exchange, *summary(...))[0])

    `ssd_segments` does the same in fewer passes. Collective, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, exchange: StateExchange | RememberedExchange, *summaries: Tensor) -> tuple[Tensor, ...]:
        """The exchange in order of the sequence."""
        half = len(summaries) // 2
        # A state may arrive as it was given: one that is remembered must not hold on to what it was computed from.
        M, S = ([each.detach() for each in part] for part in (summaries[:half], summaries[half:]))
        arrived = exchange.start(M, S).wait()
        entering = [
            torch.zeros_like(s) if state is None else state.clone() for s, state in zip(S, arrived, strict=True)
        ]
        ctx.exchange = exchange
        ctx.save_for_backward(*M, *entering)
        return tuple(entering)

    @staticmethod
    def backward(ctx: Any, *dentering: Tensor) -> tuple[Tensor | None, ...]:
        """The exchange in reverse; `dM` from what leaves a segment and what entered it."""
        half = len(dentering)
        saved = ctx.saved_tensors  # unpacked once: a checkpointed region can be read only once
        M, entering = list(saved[:half]), saved[half:]
        arrived = ctx.exchange.start(M, list(dentering), reverse=True).wait()
        dleaving = [torch.zeros_like(d) if g is None else g for d, g in zip(dentering, arrived, strict=True)]
        gradient = ctx.exchange.transition.gradient
        return None, *(gradient(g, s, m) for g, s, m in zip(dleaving, entering, M, strict=True)), *dleaving
