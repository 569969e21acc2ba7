"""What low-rank optimizers cost: bytes of state, bytes sent, reads of the device by the host."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.parallel.config import ParallelConfig
from headrace.parallel.mesh import World, build_mesh
from headrace.parallel.traffic import Traffic
from headrace.pretrain.optimizers.low_rank.clock import RefreshClock
from headrace.pretrain.optimizers.low_rank.config import LowRankConfig, MethodName
from headrace.pretrain.optimizers.low_rank.optimizer import METHODS
from low_rank_cases import CASES, CODED, GO, STEPS, build, draw, take_steps


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("period", [1, 2, 5, None])
def test_the_host_knows_when_a_basis_is_due_and_seldom_asks(period: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    skips = (torch.rand(60, generator=generator) < 0.2).tolist()
    clock, count = RefreshClock(period, torch.device("cpu")), 0
    for skipped in skips:
        expected = (count // period, count % period == 0) if period else (0, count == 0)
        assert clock.next() == expected
        assert float(clock.age(expected[0])) == (count % period if period else count)
        count += not skipped
        clock.count += not skipped
    clock = RefreshClock(period, torch.device("cpu"))
    with Reads() as reads:
        for _ in range(60):
            clock.next()
            clock.count += 1
    assert reads.count == {1: 60, 2: 60, 5: 24, None: 2}[period]


def test_ordinary_updates_do_not_wait_for_the_device() -> None:
    for config in [*CASES, *CODED]:
        optimizer = build(replace(config, refresh_steps=9), draw(0))
        take_steps(optimizer, range(2))
        with Reads() as reads:
            take_steps(optimizer, range(2, 4))
        assert reads.count == 0, config.method


SENT_SHAPE, SENT_RANK = (8, 12), 4


def bytes_of_updates(method: MethodName, dim: int) -> list[Counter[str]]:
    """What the update that chooses a basis sends, by kind, and what the next one does."""
    mesh = build_mesh(ParallelConfig(), World(dist.get_rank(), 2, torch.device("cpu")))
    config = LowRankConfig(method=method, rank=SENT_RANK, refresh_steps=5)
    shape, found = {"w": SENT_SHAPE}, []
    shard = lambda tensor: distribute_tensor(tensor, mesh.fsdp, [Shard(dim)], src_data_rank=None)
    parameter = shard(draw(0, shape)["w"])
    optimizer = build(config, {"w": parameter})
    for step in range(2):
        parameter.grad = shard(draw(1 + step, shape)["w"])
        with Traffic(mesh) as traffic:
            optimizer.step(1.0, GO)
        sent: Counter[str] = Counter()
        for entry in traffic.sent:
            sent[entry.kind] += entry.sent
        found.append(sent)
    return found


def test_bytes_that_an_update_sends(gloo: Callable) -> None:
    """Of 8-byte numbers between two ranks: only products with few columns; Grass chooses by the rows' norms alone."""
    S, L, r, k = 8, 12, SENT_RANK, 8
    through = {"reduce_scatter": r * L * 8 // 2, "all_gather": r * L * 8 // 2}
    # The shorter side is cut: products with all columns are summed, and what is made orthonormal is put together.
    randomised = {"all_reduce": (3 * S * k + 2 * L * k + k * L) * 8}
    assert gloo(2, bytes_of_updates, "galore", 0)[0] == [{**through, **randomised}, through]
    assert gloo(2, bytes_of_updates, "grass", 0)[0] == [{**through, "all_reduce": S * 8}, through]
    # The longer side is cut: the subspace is whole everywhere but for the basis, which no two ranks store twice.
    basis = {"all_gather": S * r * 8 // 2}
    assert gloo(2, bytes_of_updates, "galore", 1)[0] == [{**basis, "all_reduce": (3 * S * k + k * k) * 8}, basis]
    assert gloo(2, bytes_of_updates, "grass", 1)[0] == [{"all_reduce": S * 8}, {}]


BYTES_PER_MATRIX: dict[MethodName, Callable[[int, int, int], int]] = {
    "galore": lambda m, n, r: m * r + 2 * r * n,
    "online_subspace": lambda m, n, r: 3 * m * r + 2 * r * n,
    "grass": lambda m, n, r: 2 * r * n + 3 * r,  # rows are 8-byte numbers
    "flora": lambda m, n, r: r * n,
    "grass_walk": lambda m, n, r: m * r + 2 * r * n + 1,
    "grass_jump": lambda m, n, r: m * r + 2 * r * n + 1,
    "subset_norm": lambda m, n, r: m * n + n,
    "subspace_momentum": lambda m, n, r: m * r + r * n + n,
}
# Matrices of a layer of the paper's LLaMA 60M, trained with rank 128.
LLAMA_60M = {f"attention.{i}": (512, 512) for i in range(4)} | {f"mlp.{i}": (1376, 512) for i in range(2)}
LLAMA_60M |= {"mlp.down": (512, 1376)}


def state_bytes(config: LowRankConfig) -> int:
    parameters = {name: torch.empty(shape, device="meta") for name, shape in LLAMA_60M.items()}
    return sum(tensor.nbytes for name, tensor in build(config, parameters).state().items() if "step." not in name)


@pytest.mark.parametrize("method", list(METHODS))
def test_bytes_of_state(method: MethodName) -> None:
    expected = sum(4 * BYTES_PER_MATRIX[method](min(shape), max(shape), 128) for shape in LLAMA_60M.values())
    assert state_bytes(LowRankConfig(method=method, rank=128)) == expected


def test_subspace_momentum_has_a_fifth_of_adams_state() -> None:
    adam = sum(2 * 4 * m * n for m, n in LLAMA_60M.values())
    ours = state_bytes(LowRankConfig(method="subspace_momentum", rank=128))
    assert (ours, adam) == (5_021_824, 25_296_896)
    assert ours < 0.2 * adam


def test_8_bit_moments_have_a_quarter_of_the_bytes_and_the_same_signs() -> None:
    full, coded = (state_bytes(LowRankConfig(rank=128, state_bits=bits)) for bits in (32, 8))  # type: ignore[arg-type]
    moments = sum(2 * 128 * max(shape) for shape in LLAMA_60M.values())
    scales = sum(2 * 128 * -(-max(shape) // 256) for shape in LLAMA_60M.values())
    assert coded == full - 3 * moments + 4 * scales
    config = LowRankConfig(rank=4, refresh_steps=3, lr=0.02)
    runs = []
    for bits in (32, 8):
        parameters = draw(0)
        take_steps(build(replace(config, state_bits=bits, rank=2), parameters), range(STEPS))  # type: ignore[arg-type]
        runs.append(torch.cat([(parameters[name] - draw(0)[name]).flatten() for name in parameters]))
    assert torch.nn.functional.cosine_similarity(*runs, dim=0) > 0.99
