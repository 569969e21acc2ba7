"""The formulas of benchmarks/ssd_traffic.py against every load and store of the interpreted kernels."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

Counts = dict[str, np.ndarray]


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
def traced() -> Iterator[list[tuple[Launch, Counts, Counts]]]:
    """Collects launches, and how often each element of each of their tensors is loaded and stored."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    traces: list[tuple[Launch, Counts, Counts]] = []

    with record_launches() as launches, pytest.MonkeyPatch.context() as patch:

        def note(stored: bool, pointers: Any, mask: Any) -> None:
            if len(traces) < len(launches):
                tensors = {n: v for n, v in launches[-1].arguments.items() if isinstance(v, torch.Tensor)}
                counts = [{n: np.zeros(v.numel(), np.int64) for n, v in tensors.items()} for _ in range(2)]
                traces.append((launches[-1], *counts))
                assert len(traces) == len(launches)
            places = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
            if places.size:
                name, index = _element(launches[-1], places)
                np.add.at(traces[-1][1 + stored][name], index, 1)

        def noted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            note(False, ptrs, mask)
            return load(self, ptrs, mask, *rest)

        def noted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            note(True, ptrs, mask)
            return store(self, ptrs, value, mask, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        yield traces


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


def check(script: ModuleType, launch: Launch, loads: Counts, stores: Counts) -> None:
    """Every argument is loaded and stored as often as the script says, and the bytes are those of its sectors."""
    accesses = script.accesses(launch)
    rows = {row.argument + "_ptr": row for row in script.traffic(launch)}
    for name, access in accesses.items():
        where = f"{launch.name}, {name}"
        assert (loads[name].sum(), (loads[name] > 0).sum()) == (access.loads, access.read), where
        assert (stores[name].sum(), (stores[name] > 0).sum()) == (access.stores, access.stores), where
        whole = launch.arguments[name].numel() in (access.read, access.stores)
        assert whole or (launch.name, name.replace("_low", "")) in PARTLY, where
        size = launch.arguments[name].element_size()
        row = rows[name]
        assert (row.read, row.written) == (access.fetches * _bytes(loads[name], size), _bytes(stores[name], size)), (
            where
        )


def _bytes(counts: np.ndarray, size: int, sector: int = 32) -> int:
    """Bytes of the sectors in which an element was touched, as far as the tensor goes."""
    sectors = np.unique(np.flatnonzero(counts) * size // sector)
    return int(np.minimum(sector, counts.size * size - sectors * sector).sum())


CASES = {
    # B, L, H, P, G, N, and the tile
    "ragged, two blocks of channels and of columns": ((1, 58, 4, 20, 2, 24), {}),
    "rows": ((2, 32, 2, 16, 1, 16), {}),
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
    for trace in traces:
        check(script, *trace)
    assert [launch.name.split("_")[2] for launch, *_ in traces][:3] == ["decays", "products", "scan"]
    assert "_ssd_states_kernel" in {launch.name for launch, *_ in traces}


def test_formulas_in_bfloat16_with_states_kept(script: ModuleType) -> None:
    with traced() as traces:
        script.run((1, 58, 2, 16, 1, 24), "cpu", torch.bfloat16, keep=True)
    for trace in traces:
        check(script, *trace)
    assert "_ssd_states_kernel" not in {launch.name for launch, *_ in traces}


@pytest.mark.parametrize("name", ["segments", "splits"])
def test_formulas_with_states_in_and_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(plan_module, "CHUNKS_OF_A_SEGMENT", {"segments": 1, "splits": 16}[name])
    monkeypatch.setattr(plan_module, "num_processors", lambda x: {"segments": 4, "splits": 16}[name])
    with traced() as traces:
        script.run((1, 100, 2, 8, 1, 16), "cpu", torch.float32, keep=False, everything=True)
    for trace in traces:
        check(script, *trace)
    extra = {"segments": "_ssd_compose_kernel", "splits": "_ssd_sum_splits_kernel"}
    assert extra[name] in {launch.name for launch, *_ in traces}


def test_the_minimum_is_the_one_of_the_goals(script: ModuleType) -> None:
    for shape, (at_best, _) in script.SHAPES.items():
        assert script.minimum(shape, keep=True) / script.BANDWIDTH * 1e6 == pytest.approx(at_best, rel=2e-3)


def test_counting_runs_nothing(script: ModuleType) -> None:
    rows = script.count((1, 512, 2, 64, 1, 128), "sm_90", keep=True)
    assert [row.argument for row in rows if row.kernel == "products"] == ["B", "C", "products"]
    assert sum(row.moved for row in rows) > script.minimum((1, 512, 2, 64, 1, 128), keep=True)
