"""`headrace preflight`: would this run start, fit and be safe here? Everything is looked at, and nothing is left."""

import os
import platform
import resource
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..errors import UserError
from ..parallel.environment import read_group
from ..parallel.mesh import World, start_world, stop_world
from ..pretrain.build import parameter_bytes
from ..pretrain.config import Config, load_config
from ..pretrain.explain import Explanation, explain
from .findings import Finding, attempt, format_findings, join_findings
from .machine import check_code_date, check_device, check_memory, check_port, check_versions
from .network import check_clocks, check_network, gather
from .storage import (
    check_data,
    check_disk,
    check_memory_folder,
    check_run_folder,
    check_shared_folder,
    verify_data,
)

# Processes that do not come are not waited for as long as in a run.
JOIN_S = 60.0
# Hashing the data may take one of them hours longer than another.
HASH_S = 86400.0
# Open files: a gloo group costs a process one for each other process, and a run has a few such groups.
GROUPS, OTHER_FILES = 4, 256


@dataclass(frozen=True)
class Plan:
    """A configuration and what it comes to on this process."""

    config: Config
    explanation: Explanation

    @property
    def held_bytes(self) -> int:
        """Parameters, gradients and the optimizer's state on this rank."""
        held = self.explanation.held
        return sum(entry.parameter_bytes + entry.gradient_bytes + entry.optimizer_bytes for entry in held)

    @property
    def saved_bytes(self) -> int:
        """Of these, what this rank saves: parameters and the optimizer's state."""
        return sum(entry.parameter_bytes + entry.optimizer_bytes for entry in self.explanation.held)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint's tensors, averages among them, counters of a few bytes aside."""
        return parameter_bytes(self.config) + self.explanation.optimizer_bytes


@dataclass
class Report:
    """What was found so far.

    Attributes:
        joined: of all ranks.
        mine: of this rank, and not yet told to the others.
    """

    joined: list[Finding] = field(default_factory=list)
    mine: list[Finding] = field(default_factory=list)
    _shown: int = 0

    def join(self, hosts: list[str]) -> None:
        """Put what all ranks found together. Collective."""
        self.joined += join_findings(gather(self.mine), hosts)
        self.mine = []

    def show(self, is_first: bool) -> None:
        """Print what was not yet: the first process everything, others what it was not told of and is not well."""
        bad = [found for found in self.mine if found.status != "ok"]
        found = [*self.joined[self._shown :], *self.mine] if is_first else bad
        self._shown = len(self.joined)
        if found:
            print(format_findings(found), flush=True)


def preflight(path: Path, overrides: Iterable[str], full: bool) -> int:
    """Check everything, print a line a check on the first process, and return the exit status: 1 where one failed.

    Collective over the processes that the environment describes; no process group may exist before.

    Args:
        path: the configuration.
        overrides: `section.key=value`.
        full: hash the data too.
    """
    rank, size = read_group()
    before = [check_versions(), check_code_date(), check_open_files(size)]
    plan, finding = make_plan(path, list(overrides), rank, size)
    before.append(finding)
    if plan:
        before.append(check_saves(plan.config))
    if rank == 0 and "MASTER_PORT" in os.environ:
        before.append(port := attempt("port", check_port))
        if port.status == "FAIL":  # nobody could join
            print(format_findings(before), flush=True)
            return 1
    try:
        world = start_world(min(JOIN_S, plan.config.parallel.timeout_s) if plan else JOIN_S)
    except UserError as error:
        print(format_findings([*before, Finding("processes", "FAIL", str(error))]), flush=True)
        return 1
    report = Report(mine=before)
    try:
        look_together(world, report, plan, full)
    finally:
        report.show(world.is_first)
        with suppress(RuntimeError):
            stop_world()
    return int(any(finding.status == "FAIL" for finding in (*report.joined, *report.mine)))


def make_plan(path: Path, overrides: list[str], rank: int, size: int) -> tuple[Plan | None, Finding]:
    """The configuration, with what this rank will hold, played through without a process group; None where it fails."""
    try:
        config = load_config(path, overrides, size)
        found = explain(config, size, rank)
    except UserError as error:
        return None, Finding("config", "FAIL", str(error), everywhere=True)
    layout = " x ".join(f"{axis} {degree}" for axis, degree in found.degrees.items() if degree > 1)
    spread = f"fits {size} processes, {layout}" if layout else "fits one process"
    return Plan(config, found), Finding("config", "ok", f"{path} is valid and {spread}", everywhere=True)


def check_open_files(size: int) -> Finding:
    """Whether a process of `size` may have as many files open as its groups take; `start_world` allows it the most."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = GROUPS * size + OTHER_FILES
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Finding("open files", "ok", f"a process needs about {needed:,}, and is allowed enough")
    text = f"a process needs about {needed:,} with {size} ranks, and is allowed {limit:,} at most (ulimit -Hn)"
    return Finding("open files", "warn", f"{text}; raise the hard limit, so that ulimit -n {needed} works")


def check_saves(config: Config) -> Finding:
    """Whether a crash costs less than the whole run."""
    saves, steps = config.checkpoint, config.train.steps
    if 0 < saves.every_steps < steps:
        return Finding("checkpoints", "ok", f"one every {saves.every_steps:,} of {steps:,} steps", everywhere=True)
    if saves.time_share or steps == 1:
        text = (
            f"saves may cost {saves.time_share:.1%} of the time" if saves.time_share else "one step, and one at its end"
        )
        return Finding("checkpoints", "ok", text, everywhere=True)
    lost = ", only copies in memory: a crash that takes them" if saves.memory_every_steps else ": a crash"
    text = f"no checkpoint before the end{lost} starts the run over; set checkpoint.every_steps (below "
    return Finding("checkpoints", "warn", f"{text}train.steps={steps}) or checkpoint.time_share", everywhere=True)


def look_together(world: World, report: Report, plan: Plan | None, full: bool) -> None:
    """All checks of all ranks, joined in `report`, the same on every rank. Collective.

    Where the processes lose each other that is a finding too, and what was found until then stays in `report`.
    """
    try:
        _look_together(world, report, plan, full)
    except (RuntimeError, UserError, OSError) as error:
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        place = f"rank {world.rank} ({platform.node()})"
        text = f"{place} could not go on with the others: {line}; see what each of them says, and the network"
        report.mine.append(Finding("processes", "FAIL", text))


def _look_together(world: World, report: Report, plan: Plan | None, full: bool) -> None:
    hosts = gather(platform.node())
    report.join(hosts)
    report.joined += check_clocks(hosts)
    have_plan = gather(plan is not None)
    if plan is None or not all(have_plan):
        words = "data, folder, device and network were not looked at: they follow from the configuration"
        report.joined.append(Finding("not checked", "warn", words))
        return
    neighbours = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    _look_here(world, report, plan, full, neighbours)
    report.join(hosts)
    report.joined += check_shared_folder(plan.config.run.folder, hosts)
    report.joined += _on_first(world, "run folder", lambda: check_run_folder(plan.config))
    report.joined += _on_first(world, "disk", lambda: check_disk(plan.config, plan.checkpoint_bytes))
    if world.device.type == "cuda" and world.size > 1:
        report.show(world.is_first)  # NCCL ends a process whose collective hangs
    report.joined += check_network(plan.config.parallel, world)


def _look_here(world: World, report: Report, plan: Plan, full: bool, neighbours: list[int]) -> None:
    """The checks of this process; with `full` it waits for the slowest at the end. Collective.

    Args:
        world: all processes.
        report: takes what is found.
        plan: of the run.
        full: hash the data too.
        neighbours: the ranks on this machine.
    """
    count, place = len(neighbours), neighbours.index(world.rank)
    patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=HASH_S)) if full else None
    here = report.mine
    here.append(data := attempt("data", lambda: check_data(plan.config)))
    if full and data.status != "FAIL":
        here.append(attempt("hashes", lambda: verify_data(plan.config, place, count)))
    here.append(check_device(world.device))
    here.append(attempt("memory", lambda: check_memory(world.device, plan.held_bytes, count)))
    if plan.config.checkpoint.memory_every_steps:
        here.append(attempt("memory copies", lambda: check_memory_folder(plan.config, plan.saved_bytes, count)))
    if patient is not None:
        dist.barrier(patient)


def _on_first(world: World, check: str, action: Callable[[], Finding]) -> list[Finding]:
    """What the first process finds, on all. Collective."""
    return [finding for finding in gather(attempt(check, action) if world.is_first else None) if finding]
