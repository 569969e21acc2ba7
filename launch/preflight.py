"""`headrace preflight`: would this run start, fit and be safe here? Everything is looked at, and nothing is left."""

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
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


def preflight(path: Path, overrides: Iterable[str], full: bool) -> int:
    """Check everything, print a line a check on the first process, and return the exit status: 1 where one failed.

    Collective over the processes that the environment describes; no process group may exist before.

    Args:
        path: the configuration.
        overrides: `section.key=value`.
        full: hash the data too.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    before = [check_versions(), check_code_date()]
    plan, finding = make_plan(path, list(overrides), rank, size)
    before.append(finding)
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
    try:
        findings = look_together(world, before, plan, full)
    finally:
        stop_world()
    if world.is_first:
        print(format_findings(findings), flush=True)
    return int(any(finding.status == "FAIL" for finding in findings))


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


def look_together(world: World, before: list[Finding], plan: Plan | None, full: bool) -> list[Finding]:
    """All checks of all ranks, joined; the same on every rank. Collective."""
    hosts = gather(platform.node())
    joined = join_findings(gather(before), hosts)
    joined += check_clocks(hosts)
    have_plan = gather(plan is not None)
    if plan is None or not all(have_plan):
        words = "data, folder, device and network were not looked at: they follow from the configuration"
        return [*joined, Finding("not checked", "warn", words)]
    neighbours = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    place = neighbours.index(world.rank)
    here = [attempt("data", lambda: check_data(plan.config))]
    if full and here[0].status != "FAIL":
        here.append(attempt("hashes", lambda: verify_data(plan.config, place, len(neighbours))))
    here.append(check_device(world.device))
    here.append(attempt("memory", lambda: check_memory(world.device, plan.held_bytes, len(neighbours))))
    if plan.config.checkpoint.memory_every_steps:
        copied, count = plan.saved_bytes, len(neighbours)
        here.append(attempt("memory copies", lambda: check_memory_folder(plan.config, copied, count)))
    joined += join_findings(gather(here), hosts)
    joined += check_shared_folder(plan.config.run.folder, hosts)
    joined += _on_first(world, "run folder", lambda: check_run_folder(plan.config))
    joined += _on_first(world, "disk", lambda: check_disk(plan.config, plan.checkpoint_bytes))
    return joined + check_network(plan.config.parallel, world)


def _on_first(world: World, check: str, action: Callable[[], Finding]) -> list[Finding]:
    """What the first process finds, on all. Collective."""
    return [finding for finding in gather(attempt(check, action) if world.is_first else None) if finding]
