"""How a run is laid out over processes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh axes; their product is the number of processes.

    Attributes:
        dp_replicate: groups that hold a full copy of the parameters each.
        dp_shard: processes over which one copy is sharded (FSDP2); 0 takes all that are left.
        reshard_after_forward: free gathered parameters after a block's forward pass and gather them again in
            backward: less memory, more communication.
    """

    dp_replicate: int = 1
    dp_shard: int = 0
    reshard_after_forward: bool = True

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every degree out of range, or, for a known `world_size`, that does not divide it."""
        found = []
        if self.dp_replicate < 1:
            found.append(f"parallel.dp_replicate={self.dp_replicate} must be at least 1")
        if self.dp_shard < 0:
            found.append(f"parallel.dp_shard={self.dp_shard} must be at least 1, or 0 for all that are left")
        if found or world_size is None:
            return found
        if self.dp_shard == 0 and world_size % self.dp_replicate:
            divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
            found.append(
                f"parallel.dp_replicate={self.dp_replicate} does not divide the {world_size} processes; "
                f"use one of {divisors}"
            )
        elif self.dp_shard and self.dp_replicate * self.dp_shard != world_size:
            found.append(
                f"parallel.dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} needs "
                f"{self.dp_replicate * self.dp_shard} processes, but {world_size} were started; "
                f"start that many or set dp_shard=0"
            )
        return found

    def shard_degree(self, world_size: int) -> int:
        """The number of processes one copy of the parameters is sharded over."""
        return self.dp_shard or world_size // self.dp_replicate
