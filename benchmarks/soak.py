"""A training run to which something happens once a minute, for two hours, with nobody there; then, what it cost.

`python benchmarks/soak.py --minutes 120 --every 60` trains a small model in two processes on the CPU, and draws faults
with exponential waiting times: kills, preemption, hangs, damaged checkpoints, a full disk (all in soak_faults.py). A
loop starts the launcher again when it is gone, as slurm does with a job. Beside it the same run goes undisturbed, which
makes both half as fast: in the end every step's loss, weights and optimizer state must be the same bits. The status is
1 if they are not, or if a person would have had to come: a start that ended as the user's mistake, or a run that came
no further.

`--write` puts the table into docs/faults.md. Linux; a disk that is full needs root, who may mount a tmpfs.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak_faults import FAULTS, RunEndedError, SoakRun, environment, launch_command

from headrace.pretrain.checkpoint import latest_checkpoint, load_full, read_extra
from headrace.pretrain.config import load_config
from headrace.pretrain.goodput import Goodput, measure_goodput, read_starts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny import prepare_tiny, tiny_file  # noqa: E402  the corpus and the model that the tests have

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- table of the soak -->\n", "<!-- end of the soak -->\n"
SECTION = "\n## Two hours, a fault a minute\n\n"
DISK = "256m"
# About what a fault costs in the long run: the run is to be under way when the time is up.
FAULT_S = 20.0
CALIBRATION_STEPS = 200
SAVE_EVERY_S = 5.0
OPTIONS = [
    "model.d_model=96",
    "data.seq_len=128",
    "train.batch_rows=4",
    "parallel.dp_replicate=2",
    "parallel.timeout_s=60",
    "train.checksum_every=50",
    "eval.every_steps=500",
    "eval.max_tokens=2000",
    "eval.window=128",
    "checkpoint.keep_last=3",
    "watch.margin_s=8",
    "watch.allowance_s=60",
]


@dataclass(frozen=True)
class Planned:
    """A fault to come: when, in seconds since the run began, which, and the seed of its details."""

    at_s: float
    kind: str
    seed: int


def draw_faults(seed: int, minutes: float, every_s: float, kinds: Sequence[str]) -> list[Planned]:
    """The faults of a run. Every kind comes once before any comes again."""
    draw = random.Random(seed)
    found: list[Planned] = []
    deck: list[str] = []
    at_s = draw.expovariate(1 / every_s)
    while at_s < 60 * minutes:
        if not deck:
            deck = draw.sample(list(kinds), len(kinds))
        found.append(Planned(at_s, deck.pop(), draw.getrandbits(32)))
        at_s += draw.expovariate(1 / every_s)
    return found


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        minutes: during which faults were drawn.
        every_s: mean time between two.
        seed: they were drawn from.
        steps: of the run.
        step_s: seconds a step takes when nothing happens.
        save_every: steps between two checkpoints.
        launches: how often the loop started the launcher.
        goodput: of the disturbed run.
        interventions: why a person would have had to come.
        differences: from the undisturbed run.
        set_aside: checkpoints found damaged.
        hangs_named: ends of a start by the watch, with a page that names the rank.
        left_out: faults that could not be done here, and why.
    """

    minutes: float
    every_s: float
    seed: int
    steps: int
    step_s: float
    save_every: int
    launches: int
    goodput: Goodput
    interventions: list[str]
    differences: list[str]
    set_aside: int
    hangs_named: int
    left_out: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nobody was needed, and nothing differs."""
        return not self.interventions and not self.differences


def format_outcome(outcome: Outcome, records: Iterable[dict[str, Any]]) -> str:
    """Markdown: faults by kind, and what they came to."""
    kinds: dict[int, str] = {}
    waits: dict[str, list[float]] = {kind: [] for kind in FAULTS}
    for record in records:
        if record["kind"] in FAULTS:
            kinds[record["fault"]] = record["kind"]
        elif record["kind"] == "new step":
            waits[kinds[record["fault"]]].append(record["seconds"])
    times = list(kinds.values())
    lines = ["| what was done | times | s to the next new step, median | worst |", "| --- | ---: | ---: | ---: |"]
    rows = [(words, times.count(kind), waits[kind]) for kind, (words, _) in FAULTS.items() if kind in times]
    for words, count, seconds in [*rows, ("all", len(times), [s for found in waits.values() for s in found])]:
        shown = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("–", "–")
        lines.append(f"| {words} | {count} | {shown[0]} | {shown[1]} |")
    goodput = outcome.goodput
    lines += ["", "| of the run | |", "| --- | ---: |"]
    lines += [f"| steps, of {outcome.step_s * 1e3:.0f} ms undisturbed | {outcome.steps:,} |"]
    lines += [f"| steps lost and done again | {goodput.lost_steps:,} |"]
    lines += [f"| starts on record; launchers that the loop started | {goodput.starts}; {outcome.launches} |"]
    lines += [f"| checkpoints found damaged | {outcome.set_aside} |"]
    lines += [f"| hangs found and named by the watch | {outcome.hangs_named} |"]
    lines += [f"| goodput, of {goodput.wall_s / 60:.1f} minutes | {goodput.fraction:.1%} |"]
    lines += [f"| {words} | {share:.1%} |" for words, _, share in goodput.rows() if share >= 5e-4]
    lines += [f"| interventions | {len(outcome.interventions)} |"]
    same = "; ".join(outcome.differences) or "the same bits"
    lines += [f"| every loss, weights and optimizer state at the end | {same} |"]
    return "\n".join(lines) + "\n"


def describe(outcome: Outcome) -> str:
    """A sentence on how the figures were had."""
    left_out = f" {outcome.left_out}" if outcome.left_out else ""
    return (
        f"`python benchmarks/soak.py --minutes {outcome.minutes:g} --every {outcome.every_s:g} --seed {outcome.seed} "
        f"--steps {outcome.steps}`: two processes on {len(os.sched_getaffinity(0))} CPU cores, beside the undisturbed "
        f"run on the same, a checkpoint every {outcome.save_every} steps. Faults come at random times, "
        f"{outcome.every_s:g} s apart on average; a loop starts the launcher again when it is gone.{left_out}\n\n"
    )


def write(text: str) -> None:
    """Put the section into docs/faults.md, at its end where there is none yet."""
    page = PAGE.read_text()
    if BEGIN not in page:
        page = page.rstrip("\n") + "\n" + SECTION + BEGIN + END
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(first: Path, second: Path) -> list[str]:
    """In what two finished runs differ: records of every step, evaluations, and all that is saved at the end."""
    found = []
    keys = {"train": ("step", "tokens", "loss", "lr", "grad_norm", "skipped"), "eval": ("step", "tokens", "loss")}
    of_runs = [read_lines(folder / "metrics.jsonl") for folder in (first, second)]
    for kind, names in keys.items():
        mine, theirs = ([[r[name] for name in names] for r in run if r["kind"] == kind] for run in of_runs)
        if mine != theirs:
            where = next((a[0] for a, b in zip(mine, theirs, strict=False) if a != b), min(len(mine), len(theirs)))
            found.append(f"{kind} records differ from step {where}")
    saved = [latest_checkpoint(folder / "checkpoints") for folder in (first, second)]
    if None in saved or saved[0].name != saved[1].name:  # type: ignore[union-attr]
        return [*found, "the last checkpoints are of different steps"]
    tensors = [load_full(path) for path in saved if path]
    if tensors[0].keys() != tensors[1].keys():
        return [*found, "the last checkpoints hold different tensors"]
    found += [f"{name} differs" for name, tensor in tensors[0].items() if not tensor.equal(tensors[1][name])]
    if len({json.dumps(read_extra(path)["progress"], sort_keys=True) for path in saved if path}) > 1:
        found.append("counters differ")
    return found


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A tmpfs at `folder`, while inside; yields why there is none, where none can be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0755", "headrace-soak", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = " ".join(done.stderr.split()) if done.returncode else ""
    except OSError as error:
        reason = f"mount: {error.strerror}"
    try:
        yield f"No tmpfs could be mounted ({reason}): the disk was never full." if reason else ""
    finally:
        if not reason:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Undisturbed:
    """A run that nothing happens to, from its beginning on."""

    def __init__(self, config: Path, overrides: list[str], out: Path) -> None:
        print("undisturbed:", *overrides[len(OPTIONS) :], flush=True)
        self.folder = load_config(config, overrides).run.folder
        with (out / "undisturbed.log").open("ab") as log:
            command = launch_command(config, overrides)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())

    def finish(self) -> float:
        """Wait for its end; seconds a step, with saves and evaluations.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        if status := self.process.wait():
            raise subprocess.CalledProcessError(status, self.process.args)
        last = read_starts(self.folder / "starts.jsonl")[-1]
        return sum(last.parts.get(phase, 0.0) for phase in ("train", "eval", "save")) / last.points[-1].step


def disturb(run: SoakRun, faults: Sequence[Planned], limit_s: float) -> None:
    """Do to the run what was drawn, for so many seconds, and let it finish.

    A fault that waits for its moment keeps those after it waiting: of these some may find no time.
    """
    began = time.monotonic()
    try:
        for fault in faults:
            run.spend(fault.at_s - (time.monotonic() - began))
            if time.monotonic() - began > limit_s:
                break
            try:
                FAULTS[fault.kind][1](run, random.Random(fault.seed))
            except RunEndedError:
                break
            print(f"{time.monotonic() - began:7.0f} s, step {run.furthest:,}: {FAULTS[fault.kind][0]}", flush=True)
        while not run.is_over:
            run.spend(60.0)
    finally:
        run.close()


def soak(out: Path, minutes: float, every_s: float, seed: int, steps: int | None) -> tuple[Outcome, str]:
    """The undisturbed run, the disturbed one, and what came of it, with the table.

    Args:
        out: a new folder for all of it.
        minutes: during which faults happen.
        every_s: seconds between two, on average.
        seed: of the faults.
        steps: of the run; None: as many as fill the time.
    """
    out.mkdir(parents=True)
    data = prepare_tiny(out)
    config = tiny_file(out, data)
    brief = [*OPTIONS, f"train.steps={CALIBRATION_STEPS}"]
    pair = [Undisturbed(config, [*brief, f"run.name=calibration-{number}"], out) for number in (1, 2)]
    step_s = statistics.mean(run.finish() for run in pair)  # two at once, as the two runs below
    save_every = max(1, round(SAVE_EVERY_S / step_s))
    if steps is None:
        steps = math.ceil(60 * minutes / step_s * every_s / (every_s + FAULT_S))
    same = [*OPTIONS, f"train.steps={steps}", f"checkpoint.every_steps={save_every}"]
    whole = Undisturbed(config, [*same, "run.name=whole"], out)
    folder = out / "disturbed"
    command = launch_command(config, [*same, "run.name=disturbed"])
    run = SoakRun(command, folder, steps, out)
    with small_disk(run.checkpoints) as left_out:
        kinds = [kind for kind in FAULTS if not left_out or kind != "full_disk"]
        try:
            disturb(run, draw_faults(seed, minutes, every_s, kinds), 60 * minutes)
            undisturbed_s = whole.finish()
        finally:
            whole.process.kill()
        goodput = measure_goodput(read_starts(folder / "starts.jsonl"))
        assert goodput is not None
        outcome = Outcome(
            minutes=minutes,
            every_s=every_s,
            seed=seed,
            steps=steps,
            step_s=undisturbed_s,
            save_every=save_every,
            launches=run.launches,
            goodput=goodput,
            interventions=run.interventions,
            differences=differences(folder, whole.folder),
            set_aside=len(list(run.checkpoints.glob("damaged-*"))),
            hangs_named=(out / "launcher.log").read_text(errors="replace").count("/logs/hang.txt; "),
            left_out=left_out,
        )
    return outcome, format_outcome(outcome, read_lines(out / "faults.jsonl"))


def main() -> int:
    """Print the table; the status is 1 where somebody was needed, or something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="during which faults happen")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between two, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--steps", type=int, help="of the run (default: as many as fill the time)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already; remove it, or choose another --out")
    outcome, table = soak(options.out.resolve(), options.minutes, options.every, options.seed, options.steps)
    print(f"\n{table}", *outcome.interventions, *outcome.differences, sep="\n")
    if options.write:
        write(describe(outcome) + table)
    return 0 if outcome.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
