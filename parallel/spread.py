"""Everything that is done to a model so that it runs as a layout says; the model's own code knows nothing of it."""

from collections.abc import Callable

import torch

from ..model.block import Block
from ..model.ffns.mlp import MLP
from ..model.ffns.moe import MoE
from ..model.lm import HybridLM
from ..model.mixers.attention import Attention
from ..model.mixers.mamba1 import Mamba1
from ..model.mixers.mamba2 import Mamba2
from .attention import attend
from .config import ParallelConfig
from .experts import set_expert_seams, shard_experts
from .fsdp import shard_model
from .mesh import Mesh
from .recompute import Recompute, recompute_blocks
from .state_passing import convolve, scan, selective_scan_over_segments
from .tensor import shard_tensors

# What each kind of layer calls where the tokens of a row lie on several ranks; {} for layers that do not mix tokens.
SEAMS: dict[type, dict[str, Callable]] = {
    Mamba2: {"scan": scan, "conv": convolve},
    Mamba1: {"scan": selective_scan_over_segments, "conv": convolve},
    Attention: {"attend": attend},
    MLP: {},
    MoE: {},
}


def spread_model(
    model: HybridLM,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    compute_dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
) -> None:
    """Spread a model, or a pipeline stage of one, built on the meta device, in place; `materialise` fills it.

    From the inside out: experts are shared out over `ep`, tensors are cut over `tp`, layers share rows over `cp`,
    blocks recompute, and FSDP shards what is left over the data axes and `cp`.
    """
    shard_tensors(model, mesh, done=shard_experts(model, mesh))
    set_expert_seams(model, mesh, config)
    if config.num_segments > 1:
        share_sequences(model)
    recompute_blocks(model, recompute)
    shard_model(model, mesh.fsdp, config, compute_dtype, expert_mesh=mesh.expert_fsdp)


def share_sequences(model: HybridLM) -> None:
    """Set the seams that mixers need where a row's tokens lie on several ranks, in place.

    torch.compile leaves them alone: it would have to see through messages, and inside they are whole operators.

    Raises:
        ValueError: a layer that mixes tokens has no seams here; it would mix those of one rank only.
    """
    for block in model.layers.values():
        assert isinstance(block, Block)
        seams = SEAMS.get(type(block.mixer))
        if seams is None:
            raise ValueError(f"{type(block.mixer).__name__} cannot share rows over cp; give its seams in SEAMS")
        for name, seam in seams.items():
            setattr(block.mixer, name, torch.compiler.disable(seam))
