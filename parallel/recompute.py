"""Recompute activations in backward instead of keeping them, block by block."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..kernels.numerics import inside_operator
from ..model.lm import HybridLM
from ..model.sequence import SequenceContext

Recompute = Literal["none", "full", "selective"]

# What costs most to compute for the bytes it takes; Headrace's own operators are kept besides.
SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
# FSDP sets them around its work, of which there is less when a block runs again: they are no part of what is computed.
# torch has one set for the whole process.
MARKS = {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


def recompute_blocks(model: HybridLM, how: Recompute) -> None:
    """Make every block recompute `how` much of its forward pass in backward, in place.

    `full` keeps a block's input alone; `selective` keeps the outputs of matrix products, attention and scans too,
    so that only elementwise work is done twice (and, under context parallelism, the scan, from the states it received
    the first time). Call before sharding: FSDP's hooks then stay outside.
    """
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        SAC_IGNORED_OPS.update(MARKS)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers.values():
        block.forward = partial(_recomputed, partial(checkpoint, block.forward, **options))


def _recomputed(block: Callable, x_BLD: Tensor, seq: SequenceContext, update_BLD: Tensor | None) -> Any:
    """The block from the sum of stream and update: of those two, one tensor is kept and not both."""
    return block(x_BLD if update_BLD is None else x_BLD + update_BLD, seq, None)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    keep = operator in SAVED or getattr(operator, "namespace", "") == "headrace"
    if inside_operator.get():
        keep = False
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
