"""What every test may use: the gloo worker pool, the hypothesis profile, and the rule for GPU tests."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

import fault_table
from gloo_pool import GlooPool

# Triton reads this when it is imported: where there is no GPU, kernels are interpreted on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the first example pays for imports and warm-up. In CI the same examples are drawn every time.
hypothesis.settings.register_profile("headrace", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("headrace")

# Several test processes and gloo workers share the cores.
torch.set_num_threads(1)

# One process each, and no deadlines: under `--numprocesses 2` they take what the others leave of the cores.
ALONE = ("tests/data/", "tests/kernels/", "tests/model/")


class TwoLanes(LoadScopeScheduling):  # type: ignore[misc]
    """To one worker tests of one process; to another those that share the gloo pool, start processes, watch clocks."""

    def _split_scope(self, nodeid: str) -> str:
        return "alone" if nodeid.startswith(ALONE) else "together"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoLanes:
    """Two workers, neither of which ever has to wait for the other."""
    return TwoLanes(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under xdist, the lowest priority for tests that have no deadlines."""
    if "PYTEST_XDIST_WORKER" in os.environ and item.nodeid.startswith(ALONE):
        os.setpriority(os.PRIO_PROCESS, 0, 19)


@pytest.fixture(scope="session")
def gloo() -> Iterator[Callable]:
    """`gloo(world_size, function, *args, timeout_s=60)`: runs a top-level function on that many ranks of a fresh group.

    Returns the list of results by rank. See `gloo_pool.GlooPool.run`.
    """
    pool = GlooPool()
    yield pool.run
    pool.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of a few pages, for tests that leave it as it is."""
    from tiny import prepare_tiny  # loads Triton, which must be told first whether to interpret

    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device, those marked `interpreted` where there is one."""
    marker, reason = "gpu", "needs a CUDA device; none is visible"
    if torch.cuda.is_available():
        marker, reason = "interpreted", "kernels are compiled here: benchmarks/kernels_gpu.py judges them"
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
        if fault := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", fault.args))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows the slowest files with `--durations`; and the table of faults where those were asked for, or writes it."""
    if config.option.durations:
        seconds: Counter[str] = Counter()
        for report in chain.from_iterable(terminalreporter.stats.values()):
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
        terminalreporter.section("slowest files")
        for name, spent in seconds.most_common(config.option.durations):
            terminalreporter.write_line(f"{spent:.0f}s {name}")
    if config.option.markexpr != "fault":
        return
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    found = fault_table.table(report for report in reports if report.when == "call")
    terminalreporter.write(f"\n{found}")
    if os.environ.get("HEADRACE_WRITE_DOCS") == "1":
        fault_table.write(found)
