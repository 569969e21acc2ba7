"""How a run is laid out over processes."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from ..model.layer import divisors

Exchange = Literal["auto", "chain", "doubling", "gather"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh axes, outermost first, whose product is the number of processes, and how each axis works.

    Attributes:
        pp: pipeline stages' ranks: consecutive layers on different processes.
        dp_replicate: groups that hold a full copy of the parameters each.
        dp_shard: processes over which one copy is sharded (FSDP2), together with `cp`; 0 takes all that are left.
        cp: processes that share the tokens of a row and hand each other the recurrent state.
        tp: processes that share every matrix; between layers they share the tokens.
        ep: processes over which experts are shared out; carved out of `dp_shard` and `cp`, so it adds no processes.
        ep_over_tp: `ep` is carved out of `tp` too: tensor-parallel ranks hold whole experts, not a share of each.
        cp_layout: each process one stretch of a row, or two (the r-th and the r-th from the end), which balances
            causal attention.
        cp_virtual: every stretch is worked on as this many segments, on one process too.
        cp_exchange: how recurrent states travel: neighbour to neighbour, by doubling, gathered, or what suits best.
        cp_attention: attention layers gather keys and values, or pass them around a ring.
        repeat_exchange: recomputation exchanges states again instead of remembering the few bytes it was given.
        pp_schedule: order of micro-batches over the pipeline's stages.
        pp_stages: stages each pipeline rank holds (schedules other than 1f1b; zero_bubble wants at least two).
        reshard_after_forward: free gathered parameters after a block's forward pass and gather them again in
            backward: less memory, more communication.
        timeout_s: seconds that processes wait for each other at the start and in collectives, and after which one that
            is not heard of ends the run.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 0
    cp: int = 1
    tp: int = 1
    ep: int = 1
    ep_over_tp: bool = False
    cp_layout: Literal["contiguous", "zigzag"] = "contiguous"
    cp_virtual: int = 1
    cp_exchange: Exchange = "auto"
    cp_attention: Literal["gather", "ring"] = "gather"
    repeat_exchange: bool = False
    pp_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    pp_stages: int = 1
    reshard_after_forward: bool = True
    timeout_s: float = 600.0

    @property
    def model_ranks(self) -> int:
        """Processes that work on the same rows together."""
        return self.pp * self.cp * self.tp

    @property
    def num_stages(self) -> int:
        """Stretches that the layers are cut into."""
        return self.pp * self.pp_stages

    @property
    def num_segments(self) -> int:
        """Segments that a row is cut into."""
        return self.cp * self.cp_virtual * (2 if self.cp_layout == "zigzag" and self.cp > 1 else 1)

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every degree out of range, or, for a known `world_size`, that does not divide it."""
        at_least_one = ("pp", "dp_replicate", "cp", "tp", "ep", "cp_virtual", "pp_stages")
        found = [
            f"parallel.{name}={getattr(self, name)} must be at least 1"
            for name in at_least_one
            if getattr(self, name) < 1
        ]
        if self.dp_shard < 0:
            found.append(f"parallel.dp_shard={self.dp_shard} must be at least 1, or 0 for all that are left")
        if not 1.0 <= self.timeout_s < 1e7:
            found.append(f"parallel.timeout_s={self.timeout_s} must be at least 1 second; use a number such as 600")
        if self.pp_schedule == "1f1b" and self.pp_stages > 1:
            found.append(
                f"parallel.pp_stages={self.pp_stages} needs a schedule that interleaves; "
                'set pp_schedule="interleaved" or "zero_bubble", or pp_stages=1'
            )
        if self.pp == 1 and self.pp_stages > 1:
            found.append(f"parallel.pp_stages={self.pp_stages} needs a pipeline; set pp to 2 or more, or pp_stages=1")
        if self.pp_schedule != "1f1b" and self.pp > 1 and self.pp_stages == 1:
            found.append(f'parallel.pp_schedule="{self.pp_schedule}" needs pp_stages of at least 2 for each rank')
        if found or world_size is None:
            return found
        fixed = self.dp_replicate * self.model_ranks
        axes = ("pp", "dp_replicate", "cp", "tp", "dp_shard")
        product = " x ".join(f"{name}={getattr(self, name)}" for name in axes if getattr(self, name) > 1)
        if self.dp_shard == 0 and world_size % fixed:
            found.append(
                f"parallel: {product} makes {fixed}, which does not divide the {world_size} processes; "
                f"start a multiple of {fixed} or lower a degree"
            )
        elif self.dp_shard and fixed * self.dp_shard != world_size:
            found.append(
                f"parallel: {product or 'dp_shard=1'} needs {fixed * self.dp_shard} processes, "
                f"but {world_size} were started; start that many or set dp_shard=0"
            )
        return found or self._ep_problems(world_size)

    def _ep_problems(self, world_size: int) -> list[str]:
        degrees = {"dp_shard": self.shard_degree(world_size), "cp": self.cp}
        if self.ep_over_tp:
            degrees["tp"] = self.tp
        if prod(degrees.values()) % self.ep == 0:
            return []
        axes = " x ".join(f"{name}={degree}" for name, degree in degrees.items())
        fitting = divisors(prod(degrees.values()))
        return [
            f"parallel.ep={self.ep} does not divide the {axes} ranks that hold different tokens; use one of {fitting}"
        ]

    def shard_degree(self, world_size: int) -> int:
        """The degree of `dp_shard` among `world_size` processes."""
        return self.dp_shard or world_size // (self.dp_replicate * self.model_ranks)

    def data_ranks(self, world_size: int) -> int:
        """Different shares of a batch among `world_size` processes; 0 where the degrees do not fit."""
        return 0 if self.problems(world_size) else self.dp_replicate * self.shard_degree(world_size)
