"""Ring attention equals attention on one process, whatever the layout, and sends and computes no more than it says."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.model.config import ModelConfig
from headrace.model.mixers import attention
from headrace.model.mixers.attention import AttentionConfig, SlidingAttentionConfig
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.sequence import SequenceContext
from headrace.parallel import ring
from headrace.parallel.attention import attend
from headrace.parallel.config import ParallelConfig
from headrace.parallel.context import SegmentedContext
from headrace.parallel.layout import SequenceLayout, contiguous, zigzag
from spread import Rows, Step, differences, one_process, spread_step

SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """Attention inputs: `starts` lists the document starts of each row, None for one document a row."""

    layout: SequenceLayout
    heads: int = 4
    kv_heads: int = 2
    width: int = 3
    starts: tuple[tuple[int, ...], ...] | None = None
    rows: int = 2
    dtype: torch.dtype = torch.float64
    tiles: tuple[int, int] = (3, 5)

    def inputs(self) -> list[torch.Tensor]:
        """Queries, keys, values and the output's gradient, whole, rounded to `dtype`, in float64."""
        generator = torch.Generator().manual_seed(3)
        make = lambda heads: torch.randn(
            self.rows, heads, self.layout.length, self.width, generator=generator, dtype=torch.float64
        )
        q, k, v, dout = (make(n) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads))
        return [(3 * q).to(self.dtype).double(), *(x.to(self.dtype).double() for x in (k, v, dout))]

    def reset(self) -> torch.Tensor | None:
        """Document starts, (B, L)."""
        if self.starts is None:
            return None
        reset = torch.zeros(self.rows, self.layout.length, dtype=torch.bool)
        for row, starts in zip(reset, self.starts, strict=True):
            row[list(starts)] = True
        return reset


@dataclass
class Log:
    """What a rank did: bytes of its messages, shapes of its scores, both in order, and elements kept for backward."""

    sent: list[int] = field(default_factory=list)
    scores: list[torch.Size] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    kept: int = 0

    def start_messages(self, sends: list, receives: list, group: Any) -> list:
        """See `comm.start_messages`."""
        assert [tensor.shape for _, tensor in sends] == [tensor.shape for _, tensor in receives]
        self.sent += [tensor.nbytes for _, tensor in sends]
        self.order.append("send")
        return messages(sends, receives, group)

    def scored(self, *args: Any) -> torch.Tensor:
        """See `_Ring.scores`."""
        found = scores(*args)
        self.scores.append(found.shape)
        self.order.append("tile")
        return found

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd keeps."""
        self.kept += tensor.numel()
        return tensor


messages, scores = ring.start_messages, ring._Ring.scores
Found = tuple[list[torch.Tensor], Log, Log]


def run_ring(cases: list[Case]) -> list[Found]:
    """On each rank: its part of the output and of the gradients, and what it did forward and backward."""
    return [run_case(case) for case in cases]


def run_case(case: Case) -> Found:
    rank, layout = dist.get_rank(), case.layout
    config = ParallelConfig(cp=layout.num_ranks, cp_attention="ring")
    reset = case.reset()
    own = None if reset is None else layout.take(reset, rank)
    seq = SegmentedContext(reset_BL=own, layout=layout, group=dist.group.WORLD, config=config, row_reset_BL=reset)
    q, k, v, dout = (layout.take(x, rank, 2).to(case.dtype).requires_grad_() for x in case.inputs())
    logs = Log(), Log()
    tiles = {"TILE_QUERIES": case.tiles[0], "TILE_KEYS": case.tiles[1]}

    def watched(log: Log, action: Callable[[], Any]) -> Any:
        with (
            mock.patch.multiple(ring, start_messages=log.start_messages, **tiles),
            mock.patch.object(ring._Ring, "scores", lambda *args: log.scored(*args)),
            torch.autograd.graph.saved_tensors_hooks(log.keep, lambda kept: kept),
        ):
            return action()

    out = watched(logs[0], lambda: attend(q, k, v, seq, window=None, scale=SCALE))
    gradients = watched(logs[1], lambda: torch.autograd.grad(out, (q, k, v), dout))
    return [out.detach(), *gradients], *logs


def one(case: Case, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Output and gradients on one process."""
    q, k, v, dout = (x.to(dtype).requires_grad_() for x in case.inputs())
    out = attention.attend(q, k, v, SequenceContext(case.reset()), window=None, scale=SCALE)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def errors(case: Case, found: list[list[torch.Tensor]], expected: list[torch.Tensor]) -> list[float]:
    """How far output and gradients, put together from all ranks', are from the expected ones, relative to these.

    Where every token is a document of its own, gradients of queries and keys are 0: those are taken as 0.1.
    """
    found_whole = [torch.empty_like(x) for x in expected]
    for rank, parts in enumerate(found):
        for whole, part in zip(found_whole, parts, strict=True):
            for s in case.layout.of_rank(rank):
                whole[:, :, case.layout.span(s)] = part[:, :, case.layout.place(s)].double()
    return [float((f - e).norm() / e.norm().clamp(min=0.1)) for f, e in zip(found_whole, expected, strict=True)]


def check(gloo: Callable, cases: list[Case]) -> list[list[Found]]:
    """Run cases of equally many ranks, compare them with one process, return what ranks found, by case."""
    by_rank = gloo(cases[0].layout.num_ranks, run_ring, cases)
    by_case = [list(found) for found in zip(*by_rank, strict=True)]
    for case, found in zip(cases, by_case, strict=True):
        wrong = errors(case, [tensors for tensors, _, _ in found], one(case))
        assert all(error <= 1e-9 for error in wrong), (case, wrong)
    return by_case


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_layout_equals_one_process(gloo: Callable, ranks: int) -> None:
    cases = []
    for make in (contiguous, zigzag):
        for virtual, length in ((1, 23), (2, 25), (1, 2 * ranks), (3, 41)):
            layout = make(length, ranks, virtual)
            edges = layout.bounds[1:-1]
            # Documents that begin before, at and after where segments meet; a row of one; a row of single tokens.
            around = tuple(
                sorted({min(max(e + d, 0), length - 1) for e, d in zip(edges, (-1, 0, 1) * 9, strict=False)})
            )
            starts = (around, (), edges, tuple(range(length)))
            cases += [
                Case(layout, starts=starts, rows=4, tiles=(4, 7)),
                Case(layout, heads=3, kv_heads=3 if virtual == 1 else 1, rows=1, tiles=(128, 2048)),
            ]
    check(gloo, cases)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Segments of any lengths, on ranks in any order, some of which hold more tokens than others."""
    ranks = draw(st.integers(1, 4))
    owners = draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=5))]))
    bounds = [0]
    for length in draw(st.lists(st.integers(1, 9), min_size=len(owners), max_size=len(owners))):
        bounds.append(bounds[-1] + length)
    kv_heads, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    places = st.lists(st.integers(0, bounds[-1] - 1), max_size=6).map(tuple)
    tile = draw(st.integers(1, 6))
    return Case(
        SequenceLayout(tuple(owners), tuple(bounds)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        width=draw(st.integers(1, 4)),
        rows=rows,
        starts=draw(st.none() | st.tuples(*[places] * rows)),
        tiles=(tile, tile + draw(st.integers(0, 6))),
    )


@settings(max_examples=25)
@given(case=any_case())
def test_any_segments_equal_one_process(gloo: Callable, case: Case) -> None:
    check(gloo, [case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types_are_as_exact_as_on_one_process(gloo: Callable, dtype: torch.dtype) -> None:
    case = Case(zigzag(50, 2), starts=((), (20, 26)), width=8, dtype=dtype)
    found = [tensors for tensors, _, _ in (ranks[0] for ranks in gloo(2, run_ring, [case]))]
    assert {tensor.dtype for parts in found for tensor in parts} == {dtype}
    expected = one(case)
    limits = [float((x.double() - e).norm() / e.norm()) for x, e in zip(one(case, dtype), expected, strict=True)]
    for error, limit in zip(errors(case, found, expected), limits, strict=True):
        assert error <= 2 * limit


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_messages_are_as_many_and_as_large_as_stated(gloo: Callable, ranks: int) -> None:
    """Also that the next block is under way before a tile is computed, and that R times nothing is kept."""
    owners = tuple(range(ranks))
    layout = SequenceLayout((*owners, *owners), (0, *range(3, 2 * ranks + 2), 40))  # ranks hold unequal numbers
    case = Case(layout)
    narrow = replace(case, dtype=torch.bfloat16)
    elements = 2 * case.rows * case.kv_heads * layout.most_tokens * case.width
    by_rank = gloo(ranks, run_ring, [case, narrow])
    for rank, results in enumerate(by_rank):
        for (_, forward, backward), element, wide in zip(results, (8, 2), (8, 4), strict=True):
            assert forward.sent == [element * elements] * (ranks - 1)
            assert sorted(backward.sent) == sorted([element * elements, wide * elements] * (ranks - 1))
            if ranks > 1:
                assert forward.order[0] == backward.order[0] == "send"
            mine = case.rows * case.heads * sum(layout.lengths(rank))
            # Queries and output, log-sum-exp, and the block of keys and values.
            assert forward.kept == mine * (2 * case.width + 1) + elements


def test_zigzag_shares_the_work_evenly_and_contiguous_does_not(gloo: Callable) -> None:
    def work(layout: SequenceLayout, starts: tuple | None = None) -> list[tuple[int, int]]:
        case = Case(layout, rows=1, tiles=(1, 7), starts=starts)
        found = check(gloo, [case])[0]
        return [tuple(sum(shape.numel() for shape in log.scores) // case.heads for log in logs) for _, *logs in found]

    ranks, n = 4, 6
    pairs = ranks * 2 * n * (ranks * 2 * n + 1) // 2
    assert work(zigzag(ranks * 2 * n, ranks)) == [(pairs // ranks,) * 2] * ranks
    # One at a time: nothing is computed that no query sees, and nothing twice.
    n *= 2
    by_rank = [n * (n + 1) // 2 + r * n * n for r in range(ranks)]
    assert sum(by_rank) == pairs
    assert work(contiguous(ranks * n, ranks)) == [(p, p) for p in by_rank]
    # On a CPU, keys that all queries of a tile have left behind cost nothing either.
    documents = (tuple(range(0, ranks * n, n)),)
    assert work(contiguous(ranks * n, ranks), documents) == [(n * (n + 1) // 2,) * 2] * ranks


def test_scores_in_memory_are_those_of_a_tile(gloo: Callable) -> None:
    case = Case(contiguous(300, 2), tiles=(8, 16), rows=1)
    for _, *logs in check(gloo, [case])[0]:
        for log in logs:
            assert max(shape[-2] for shape in log.scores) == 8
            assert max(shape[-1] for shape in log.scores) == 16


def check_operators() -> None:
    """The operators do what they declare, for fake tensors too."""
    case = Case(zigzag(14, 1), starts=((3,), ()))
    q, k, v, dout = case.inputs()
    reset = case.reset()
    assert reset is not None
    start = torch.arange(14) - SequenceContext(reset).position_BL(14, q.device)
    group = dist.group.WORLD
    assert group is not None
    where = {
        "owners": list(case.layout.owners),
        "bounds": list(case.layout.bounds),
        "group_name": group.group_name,
        "scale": SCALE,
    }
    kv = torch.stack([k, v])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ring._forward, (q, kv, start), where, test_utils=tests)
    out, lse = ring._forward(q, kv, None, **where)
    torch.library.opcheck(ring._backward, (dout, q, kv, out, lse, None), where, test_utils=tests)


def test_operators_keep_their_word(gloo: Callable) -> None:
    gloo(1, check_operators)


def model_config(pattern: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=38,
        d_model=16,
        pattern=pattern,
        mamba2=Mamba2Config(head_dim=4, d_state=5, num_groups=2, chunk_size=8),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, rope_fraction=1.0),
        sliding_attention=SlidingAttentionConfig(num_heads=4, num_kv_heads=2, window=6),
    )


HYBRID, ATTENTION = "attention mlp sliding_attention mamba2 attention", "attention sliding_attention attention"
ROWS = Rows(count=2, length=41, starts=(9, 20, 21, 30))


def counted_step(pattern: str, parallel: ParallelConfig, rows: Rows, how: Any) -> tuple[Step, int]:
    """`spread_step` and the number of messages that rings sent on this rank."""
    log = Log()
    with mock.patch.object(ring, "start_messages", log.start_messages):
        step = spread_step(model_config(pattern), parallel, rows, how)
    return step, len(log.sent)


def ring_config(layout: str = "contiguous", **degrees: int) -> ParallelConfig:
    return ParallelConfig(cp_attention="ring", cp_layout=layout, **degrees)


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        (ring_config(cp=1, cp_virtual=3), "none"),
        (ring_config(cp=2), "selective"),
        (ring_config(cp=3, layout="zigzag"), "none"),
        (ring_config(cp=2, cp_virtual=2, layout="zigzag"), "full"),
        (ring_config(cp=2, tp=2, layout="zigzag"), "none"),
        (ring_config(cp=2, tp=2), "full"),
        (ring_config(cp=2, dp_shard=2, layout="zigzag"), "selective"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"cp{value.cp}tp{value.tp}{value.cp_layout}",
)
def test_a_step_equals_one_process(gloo: Callable, parallel: ParallelConfig, recompute: str) -> None:
    world = parallel.cp * parallel.tp * max(parallel.dp_shard, 1)
    pattern = ATTENTION if recompute == "selective" else HYBRID
    expected = one_process(model_config(pattern), ROWS)
    for step, sent in gloo(world, counted_step, pattern, parallel, ROWS, recompute):
        assert not differences(step, expected)
        # Two layers, three messages a hop; recomputation sends keys and values again, unless it kept the output.
        assert sent == 2 * (parallel.cp - 1) * (4 if recompute == "full" else 3)


def test_none_is_sent_where_attention_gathers(gloo: Callable) -> None:
    parallel = ParallelConfig(cp=2, cp_layout="zigzag")
    expected = one_process(model_config(HYBRID), ROWS)
    for step, sent in gloo(2, counted_step, HYBRID, parallel, ROWS, "none"):
        assert not differences(step, expected)
        assert sent == 0
