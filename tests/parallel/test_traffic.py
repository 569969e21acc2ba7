"""Bytes and messages, exactly: of state passing (PERFORMANCE.md), of tensor parallelism, of recomputation."""

from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headrace.data import Batch
from headrace.model.config import ModelConfig
from headrace.model.mixers.attention import AttentionConfig
from headrace.model.mixers.mamba1 import Mamba1Config
from headrace.model.mixers.mamba1 import ScanInputs as SelectiveInputs
from headrace.model.mixers.mamba2 import Mamba2Config, ScanInputs
from headrace.parallel.config import Exchange, ParallelConfig
from headrace.parallel.context import share_row
from headrace.parallel.dry_run import fake_world
from headrace.parallel.mesh import Mesh, build_mesh
from headrace.parallel.recompute import Recompute
from headrace.parallel.state_passing import convolve, scan, selective_scan_over_segments
from headrace.parallel.traffic import Sent, Traffic
from spread import Case, Rows, build_engine
from tiny import this_world

# The Nano mixer: heads, their width, state, groups, taps.
H, P, N, G, K = 64, 64, 128, 8, 4
CHANNELS = H * P + 2 * G * N
STATE = H * P * N * 4
M = H * 4
HALO = (K - 1) * CHANNELS * 2


def mixer(mesh: Mesh, config: ParallelConfig, tokens: int) -> list[Sent]:
    """What the convolution and recurrence of one layer send, forward and backward, with `tokens` tokens a rank."""
    (own,), seq = share_row(config, mesh, [torch.zeros(1, tokens * config.cp)], None)
    t = own.shape[1]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.rand(shape, generator=generator).to(dtype).requires_grad_()

    taps, dt, A, D = draw(CHANNELS, K), draw(1, t, H, dtype=torch.float32), draw(H, dtype=torch.float32), draw(H)
    inputs = draw(1, t, CHANNELS)
    with Traffic(mesh) as traffic:
        out, _ = convolve(inputs, taps, None, None, seq, 0)
        x, B, C = out.split([H * P, G * N, G * N], -1)
        heads = ScanInputs(x.unflatten(-1, (H, P)), dt, -A, B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), D)
        y, _ = scan(heads, 16, None, seq, 0)
        y.sum().backward()
    return traffic.sent


def mixer_in_gloo(config: ParallelConfig, tokens: int) -> list[Sent]:
    return mixer(build_mesh(config, this_world()), config, tokens)


def mixer_in_fake_world(config: ParallelConfig, tokens: int) -> list[list[Sent]]:
    found = []
    for rank in range(config.cp):
        with fake_world(config, rank, config.cp) as fake, fake.tensors():
            found.append(mixer(fake.mesh, config, tokens))
    return found


def layout(ranks: int, how: Exchange, name: str = "contiguous") -> ParallelConfig:
    return ParallelConfig(cp=ranks, cp_exchange=how, cp_layout=name)  # type: ignore[arg-type]


def total(sent: list[Sent], backward: bool | None = None) -> int:
    return sum(entry.sent for entry in sent if backward in (None, entry.phase == "backward"))


def messages(sent: list[Sent]) -> list[int]:
    return [entry.sent for entry in sent if entry.kind == "send"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_chain_sends_one_state_and_one_halo_each_way(gloo: Callable, ranks: int) -> None:
    by_rank = gloo(ranks, mixer_in_gloo, layout(ranks, "chain"), 5)
    expected = 2 * STATE + 2 * HALO
    assert expected == 4_268_032
    assert max(total(s, False) for s in by_rank) + max(total(s, True) for s in by_rank) == expected
    for inner in by_rank[1:-1]:
        assert messages(inner) == [HALO, STATE, STATE, HALO]
        assert total(inner) == expected
    assert gloo(ranks, mixer_in_gloo, layout(ranks, "chain"), 17) == by_rank


def busiest_rounds(by_rank: list[list[Sent]]) -> int:
    """The sum over rounds, which are known by the distance of their messages, of the most that a rank sends in each."""
    most: dict[tuple, int] = defaultdict(int)
    for rank, sent in enumerate(by_rank):
        for entry in sent:
            if entry.kind == "send" and entry.peer is not None:
                key = entry.phase, abs(entry.peer - rank), entry.sent == HALO
                most[key] = max(most[key], entry.sent)
    return sum(most.values())


@pytest.mark.parametrize(
    ("ranks", "expected"), [(2, 4_268_544), (4, 8_463_360), (8, 12_658_176), (16, 16_852_992)], ids=str
)
def test_doubling_sends_a_state_and_transition_a_round(gloo: Callable, ranks: int, expected: int) -> None:
    rounds = (ranks - 1).bit_length()
    assert expected == 2 * (rounds * (STATE + M) + HALO)
    if ranks <= 8:
        by_rank = gloo(ranks, mixer_in_gloo, layout(ranks, "doubling"), 5)
        assert gloo(ranks, mixer_in_gloo, layout(ranks, "doubling"), 9) == by_rank
    else:
        by_rank = mixer_in_fake_world(layout(ranks, "doubling"), 5)
    assert busiest_rounds(by_rank) == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_gather_sends_every_summary_to_every_rank(gloo: Callable, ranks: int) -> None:
    by_rank = gloo(ranks, mixer_in_gloo, layout(ranks, "gather"), 5)
    assert [total(sent) for sent in by_rank[1:-1]] == [2 * (ranks - 1) * (STATE + M) + 2 * HALO] * (ranks - 2)
    assert by_rank == gloo(ranks, mixer_in_gloo, layout(ranks, "gather"), 8)
    for sent in by_rank:
        gathers = [entry.sent for entry in sent if entry.kind == "all_gather"]
        assert gathers == [(ranks - 1) * (STATE + M)] * 2


@pytest.mark.parametrize(("ranks", "megabytes"), [(2, 8.5), (4, 25.6), (8, 59.8), (16, 128)])
def test_zigzag_halves(ranks: int, megabytes: float) -> None:
    """Ours beside what gathers the halos too, for two segments a rank, as PERFORMANCE.md gives it."""
    gather = mixer_in_fake_world(layout(ranks, "gather", "zigzag"), 10)
    theirs = 4 * (ranks - 1) * (STATE + HALO)
    assert round(theirs / 1e6, 1 if megabytes < 100 else 0) == megabytes
    halos = 4 if ranks > 2 else 2
    # At two ranks no rank has two segments that begin behind another rank's.
    assert max(total(sent) for sent in gather) == 4 * (ranks - 1) * (STATE + M) + halos * HALO < theirs
    chain = mixer_in_fake_world(layout(ranks, "chain", "zigzag"), 10)
    assert max(total(sent) for sent in chain) == halos * (STATE + HALO)


def test_fake_ranks_send_what_real_ones_send(gloo: Callable) -> None:
    for how in ("chain", "doubling", "gather"):
        for name in ("contiguous", "zigzag"):
            config = layout(4, how, name)  # type: ignore[arg-type]
            assert gloo(4, mixer_in_gloo, config, 10) == mixer_in_fake_world(config, 10), (how, name)


D, VOCAB, ROWS, LENGTH = 16, 40, 2, 8
T = ROWS * LENGTH


def model_config(groups: int, pattern: str = "mamba2 attention mlp mamba2") -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=D,
        pattern=pattern,
        mamba2=Mamba2Config(head_dim=4, d_state=8, num_groups=groups, chunk_size=4),
        mamba1=Mamba1Config(d_state=3, dt_rank=5),
        attention=AttentionConfig(num_heads=4, rope_fraction=1.0),
    )


def step(config: ModelConfig, parallel: ParallelConfig, recompute: Recompute = "none") -> list[Sent]:
    """What a float64 step of a whole model sends."""
    case = Case(model=config, parallel=parallel, rows=Rows(ROWS, LENGTH), recompute=recompute)
    mesh = build_mesh(parallel, this_world())
    engine = build_engine(case, mesh, this_world())
    tokens, targets, reset = case.rows.tensors(VOCAB)
    share = slice(mesh.data_rank, None, mesh.data_ranks)
    with Traffic(mesh, engine.models) as traffic:
        engine.forward_backward(Batch(tokens[share], targets[share], reset[share], 0))
    return traffic.sent


def by_block(sent: list[Sent], axis: str) -> dict[str, Counter]:
    found: dict[str, Counter] = defaultdict(Counter)
    for entry in sent:
        if entry.axis == axis:
            found[entry.block][entry.phase, entry.kind, entry.sent] += 1
    return found


@pytest.mark.parametrize(("ranks", "groups"), [(2, 2), (4, 4), (4, 2)])
def test_tensor_parallel_blocks_gather_and_scatter_once_each_way(gloo: Callable, ranks: int, groups: int) -> None:
    share = (ranks - 1) * T * D * 8 // ranks
    numbers = 3 * (ranks - 1) * T * 8
    gather = {("forward", "all_gather", share): 1, ("backward", "reduce_scatter", share): 1}
    scatter = {("forward", "reduce_scatter", share): 1, ("backward", "all_gather", share): 1}
    statistics = 2 * (ranks - 1) * T * groups * 8 // ranks
    spread_norm = {(phase, "all_reduce", statistics): 1 for phase in ("forward", "backward") if groups < ranks}
    replicated = 5 * D + (0 if groups == ranks else 2 * 2 * groups * 8 * (D + 4 + 1))
    for sent in gloo(ranks, step, model_config(groups), ParallelConfig(tp=ranks)):
        assert by_block(sent, "tp") == {
            "embed": scatter,
            "layers.0": gather | scatter | spread_norm,
            "layers.1": gather | scatter,
            "layers.2": gather | scatter,
            "layers.3": gather | scatter | spread_norm,
            "head": gather | {("forward", "all_gather", numbers): 1},
            # The number of targets, and all gradients of parameters that are not cut.
            "": {
                ("between", "all_reduce", 2 * (ranks - 1) * 8 // ranks): 1,
                ("between", "all_reduce", 2 * (ranks - 1) * replicated * 8 // ranks): 1,
            },
        }
        assert {entry.axis for entry in sent} == {"tp"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_mamba1_sums_its_small_projections_once_each_way(gloo: Callable, ranks: int) -> None:
    share, small = (ranks - 1) * T * D * 8 // ranks, 2 * (ranks - 1) * T * (5 + 2 * 3) * 8 // ranks
    for sent in gloo(ranks, step, model_config(2, "mamba1"), ParallelConfig(tp=ranks)):
        assert by_block(sent, "tp")["layers.0"] == {
            ("forward", "all_gather", share): 1,
            ("forward", "all_reduce", small): 1,
            ("forward", "reduce_scatter", share): 1,
            ("backward", "all_gather", share): 1,
            ("backward", "all_reduce", small): 1,
            ("backward", "reduce_scatter", share): 1,
        }


def selective_scan_in_gloo(config: ParallelConfig, tokens: int) -> list[Sent]:
    """What the scan of one Mamba-1 layer of 6 channels and 5 states sends, forward and backward."""
    mesh = build_mesh(config, this_world())
    (own,), seq = share_row(config, mesh, [torch.zeros(1, tokens * config.cp)], None)
    x, dt, B, C = (torch.rand(1, own.shape[1], width, requires_grad=True) for width in (6, 6, 5, 5))
    with Traffic(mesh) as traffic:
        inputs = SelectiveInputs(x, dt, -torch.rand(6, 5), B, C, torch.rand(6))
        selective_scan_over_segments(inputs, None, seq, 0)[0].sum().backward()
    return traffic.sent


def test_mamba1_passes_states_whose_bytes_do_not_depend_on_the_row(gloo: Callable) -> None:
    """A transition of Mamba-1 is as large as a state: `chain`, which sends none, sends half of what others do."""
    state = 6 * 5 * 4
    for how, inner in {"chain": [state, state], "doubling": [2 * state] * 3}.items():
        by_rank = gloo(4, selective_scan_in_gloo, layout(4, how), 5)  # type: ignore[arg-type]
        assert by_rank == gloo(4, selective_scan_in_gloo, layout(4, how), 17)  # type: ignore[arg-type]
        assert messages(by_rank[1]) == inner


def test_recomputation_does_not_exchange_again_unless_asked_to(gloo: Callable) -> None:
    config = model_config(2, "mamba2 mamba1 mlp")
    kept = gloo(2, step, config, ParallelConfig(cp=2))
    for rank, sent in enumerate(gloo(2, step, config, ParallelConfig(cp=2), "full")):
        assert by_block(sent, "cp") == by_block(kept[rank], "cp")
    for rank, sent in enumerate(gloo(2, step, config, ParallelConfig(cp=2, repeat_exchange=True), "full")):
        expected = by_block(kept[rank], "cp")
        for block in expected.values():
            again = {key: count for key, count in block.items() if key[0] == "forward"}
            for (_, kind, size), count in again.items():
                block["backward", kind, size] += count
        assert by_block(sent, "cp") == expected


def test_axes_that_coincide_are_told_apart(gloo: Callable) -> None:
    """Both are the whole world: parameters go over `fsdp`, states and halos over `cp`."""
    for sent in gloo(2, step, model_config(2, "mamba2 mlp"), ParallelConfig(cp=2)):
        assert {entry.axis for entry in sent if entry.kind in ("send", "recv")} == {"cp"}
        assert {(entry.block, entry.phase, entry.kind) for entry in sent if entry.axis == "fsdp"} == {
            ("root", "forward", "all_gather"),
            ("root", "backward", "reduce_scatter"),
            ("", "between", "all_reduce"),
            *((f"layers.{i}", phase, "all_gather") for i in range(2) for phase in ("forward", "backward")),
            *((f"layers.{i}", "backward", "reduce_scatter") for i in range(2)),
        }
