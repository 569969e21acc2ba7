"""The formulas of benchmarks/ssd_traffic.py against every load and store of the interpreted kernels."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from headrace.kernels.launch import Launch, record_launches
from headrace.kernels.ssd.fused import plan as plan_module
from headrace.kernels.tiles import tile

# Values are of no concern here, and bfloat16 products are wrong when interpreted.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@dataclass
class Counts:
    """Of each element of a tensor: how often it is loaded and stored, by which programs first and last."""

    loads: np.ndarray
    stores: np.ndarray
    first: np.ndarray
    last: np.ndarray


Trace = tuple[Launch, dict[str, Counts]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/ssd_traffic.py"
    spec = importlib.util.spec_from_file_location("ssd_traffic", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["ssd_traffic"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def traced() -> Iterator[list[Trace]]:
    """Collects launches, and what becomes of each element of each of their tensors."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    traces: list[Trace] = []

    with record_launches() as launches, pytest.MonkeyPatch.context() as patch:

        def note(builder: Any, pointers: Any, mask: Any, stored: bool) -> None:
            if len(traces) < len(launches):
                traces.append((launches[-1], _counts(launches[-1])))
            launch, counts = traces[-1]
            places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
            if not places.size:
                return
            name, index = _element(launch, places)
            np.add.at(counts[name].stores if stored else counts[name].loads, index, 1)
            if not stored:
                program = np.ravel_multi_index(builder.grid_idx, builder.grid_dim, order="F")
                counts[name].first[index] = np.minimum(counts[name].first[index], program)
                counts[name].last[index] = np.maximum(counts[name].last[index], program)

        def noted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            note(self, ptrs, mask, False)
            return load(self, ptrs, mask, *rest)

        def noted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            note(self, ptrs, mask, True)
            return store(self, ptrs, value, mask, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        yield traces
        assert len(traces) == len(launches)


def _counts(launch: Launch) -> dict[str, Counts]:
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    return {name: Counts(*(np.full(v.numel(), start) for start in (0, 0, 1 << 40, -1))) for name, v in tensors.items()}


def _element(launch: Launch, places: np.ndarray) -> tuple[str, np.ndarray]:
    """Which argument the addresses belong to, and which of its elements; never more than one argument."""
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            offsets = places - value.data_ptr()
            if (offsets >= 0).all() and (offsets < value.numel() * value.element_size()).all():
                assert value.is_contiguous()
                return name, offsets // value.element_size()
    raise AssertionError(f"{launch.name} touches memory of none of its arguments, or of several at once")


# What kernels read in part, and what part.
PARTLY = {
    ("_ssd_states_kernel", "log_ptr"): "the last token of each chunk, unless in reverse",
    ("_ssd_states_kernel", "from_ptr"): "all or, in reverse, nothing",
    ("_ssd_flows_kernel", "log_ptr"): "the last token of each chunk",
    ("_ssd_flows_kernel", "dheads_ptr"): "flows through chunks, which become parts of dA; not parts of dD",
    ("_ssd_gradients_kernel", "from_ptr"): "all but the last chunk of each span, whose state none passes on",
}


def check(script: ModuleType, traces: list[Trace]) -> None:
    """Every argument is loaded and stored as often as the script says, and the bytes are those of its sectors."""
    for launch, counts in traces:
        rows = {row.argument + "_ptr": row for row in script.traffic(launch)}
        for name, access in script.accesses(launch).items():
            where, of = f"{launch.name}, {name}", counts[name]
            assert (of.loads.sum(), (of.loads > 0).sum()) == (access.loads, access.read), where
            assert (of.stores.sum(), (of.stores > 0).sum()) == (access.stores, access.stores), where
            whole = launch.arguments[name].numel() in (access.read, access.stores)
            assert whole or (launch.name, name.replace("_low", "")) in PARTLY, where
            size = launch.arguments[name].element_size()
            assert rows[name].read == access.fetches * _bytes(of.loads, size), where
            assert rows[name].written == _bytes(of.stores, size), where
            if access.fetches == 1:
                assert ((of.last - of.first)[of.loads > 0] < access.reach).all(), where


def _bytes(counts: np.ndarray, size: int, sector: int = 32) -> int:
    """Bytes of the sectors in which an element was touched, as far as the tensor goes."""
    sectors = np.unique(np.flatnonzero(counts) * size // sector)
    return int(np.minimum(sector, counts.size * size - sectors * sector).sum())


CASES = {
    # B, L, H, P, G, N, and the tile
    "ragged, two blocks of channels and of columns": ((1, 58, 2, 20, 1, 24), {}),
    "rows and groups": ((2, 32, 4, 8, 2, 16), {}),
    "other tiles": ((1, 140, 2, 16, 1, 40), {"chunk": 32, "span": 4, "block_p": 16, "columns": 32}),
    "span of one": ((1, 40, 2, 16, 2, 32), {"span": 1, "columns": 32}),
    "short": ((1, 5, 1, 8, 1, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas_are_what_the_kernels_do(script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shape, choice = CASES[name]
    monkeypatch.setattr(plan_module, "tile", lambda *names: tile(*names) | choice)
    with traced() as traces:
        script.run(shape, "cpu", torch.float32, keep=False)
    check(script, traces)
    assert [launch.name.split("_")[2] for launch, *_ in traces][:3] == ["decays", "products", "scan"]
    assert "_ssd_states_kernel" in {launch.name for launch, *_ in traces}


def test_formulas_in_bfloat16_with_states_kept(script: ModuleType) -> None:
    with traced() as traces:
        script.run((1, 58, 2, 16, 1, 24), "cpu", torch.bfloat16, keep=True)
    check(script, traces)
    assert "_ssd_states_kernel" not in {launch.name for launch, *_ in traces}


@pytest.mark.parametrize("name", ["segments", "splits"])
def test_formulas_with_states_in_and_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(plan_module, "CHUNKS_OF_A_SEGMENT", {"segments": 1, "splits": 16}[name])
    monkeypatch.setattr(plan_module, "num_processors", lambda x: {"segments": 4, "splits": 16}[name])
    with traced() as traces:
        script.run((1, 100, 2, 8, 1, 16), "cpu", torch.float32, keep=False, everything=True)
    check(script, traces)
    extra = {"segments": "_ssd_compose_kernel", "splits": "_ssd_sum_splits_kernel"}
    assert extra[name] in {launch.name for launch, *_ in traces}


def test_the_minimum_is_the_one_of_the_goals(script: ModuleType) -> None:
    for shape, (at_best, _) in script.SHAPES.items():
        assert script.minimum(shape, keep=True) / script.BANDWIDTH * 1e6 == pytest.approx(at_best, rel=2e-3)


def test_counting_runs_nothing(script: ModuleType) -> None:
    rows = script.count((1, 512, 2, 64, 1, 128), "sm_90", keep=True)
    assert [row.argument for row in rows if row.kernel == "products"] == ["B", "C", "products"]
    assert sum(row.moved for row in rows) > script.minimum((1, 512, 2, 64, 1, 128), keep=True)


def test_what_comes_from_memory_once_is_loaded_by_programs_that_run_together(script: ModuleType) -> None:
    for shape in script.SHAPES:
        for row in script.count(shape, "sm_90", keep=False):
            assert row.reach <= 132 or row.moved < 1e6, row
