"""Runs as slurm jobs, on a real slurm (`make slurm-test`): whatever slurm does to a job, the weights are the same.

Each run is stopped in the end by the file STOP, wherever it has come to by then, and compared bit for bit with one that
nothing happened to, started without slurm and stopped after the same step. How long it took is printed, and goes into
docs/faults.md with `HEADRACE_WRITE_DOCS=1`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import Cluster
from headrace.pretrain.checkpoint import latest_checkpoint, load_full
from tiny import tiny_file

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif("HEADRACE_SLURM" not in os.environ, reason="starts slurm's daemons: run `make slurm-test`"),
]
HEADRACE = (sys.executable, "-m", "headrace")
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- table of slurm -->\n", "<!-- end of slurm -->"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[float, float]]]:
    """By what was done: seconds until the job ran again, and from then to twenty new steps."""
    found: dict[str, tuple[float, float]] = {}
    yield found
    lines = ["| what was done | s until the job runs again | s from then to 20 new steps |", "| --- | ---: | ---: |"]
    lines += [f"| {what} | {first:.0f} | {then:.0f} |" for what, (first, then) in found.items()]
    print("\n" + "\n".join(lines))
    if os.environ.get("HEADRACE_WRITE_DOCS") == "1" and not request.session.testsfailed:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    yield found
    found.stop()


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, data: Path, table: dict[str, tuple[float, float]]) -> "SlurmRun":
    return SlurmRun(cluster, tmp_path, data, table)


class SlurmRun:
    """A run without end on two nodes, one process on each."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path, table: dict[str, tuple[float, float]]) -> None:
        self.cluster, self.root, self._table = cluster, folder, table
        self.folder = folder / "job"
        self.config = tiny_file(folder, data, steps=9999999, every_steps=40)

    def submit(self, *options: str) -> str:
        """The number of the job."""
        self.cluster.wait_for(lambda: len(self.cluster.free_nodes()) == 2, "two free nodes")
        command = [*HEADRACE, "launch", str(self.config), "--nodes", "2", *options, "run.name=job"]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        words = dict(word.partition("=")[::2] for word in self.cluster.ask("scontrol", "show", "job").split())
        return words["JobId"]

    def steps(self) -> int:
        """Of the last record."""
        path = self.folder / "metrics.jsonl"
        records = path.read_text().split("\n") if path.exists() else []
        return json.loads(records[-2])["step"] if len(records) > 1 else 0

    def wait_for_steps(self, more: int = 20) -> None:
        """Until the run has come further."""
        before = self.steps()
        self.cluster.wait_for(lambda: self.steps() >= before + more, f"{more} steps after {before}")

    def comes_back(self, job: str, what: str) -> None:
        """Wait until it runs, and takes steps, after `what`, and note how long that takes."""
        began = time.monotonic()
        self.cluster.wait_for(lambda: self.cluster.state(job) == "RUNNING", "the job to run again")
        runs = time.monotonic()
        self.wait_for_steps()
        self._table[what] = runs - began, time.monotonic() - runs

    def log(self) -> str:
        """Of all jobs."""
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("job-*[0-9].log")))

    def stop_and_compare(self, job: str) -> int:
        """The step after which it stopped, once its weights are found to be those of a run without faults."""
        (self.folder / "STOP").touch()
        self.cluster.wait_for(lambda: self.cluster.state(job) == "COMPLETED", "the job to be completed")
        step = json.loads((self.folder / "STOPPED").read_text())["step"]
        command = [*HEADRACE, "train", str(self.config), "--nproc", "2", "--until", str(step), "run.name=whole"]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        expected, found = (load_full(latest_checkpoint(self.root / name / "checkpoints")) for name in ("whole", "job"))
        assert expected.keys() == found.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
        records = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, step + 1))
        return step


def test_time_limits_make_a_chain_of_jobs(run: SlurmRun) -> None:
    """Four limits of a minute, the signal as early as slurm sends it."""
    job = run.submit("--time", "1", "--signal-ahead", "55")
    queued = "asked to stop ahead of the time limit"
    run.cluster.wait_for(lambda: run.log().count(queued) >= 4, "four hops", 500)
    run.comes_back(job, "time limit, for the fourth time")
    run.stop_and_compare(job)
    assert "crash" not in run.log()


def test_a_higher_partition_preempts(run: SlurmRun) -> None:
    job = run.submit()
    run.wait_for_steps()
    urgent = run.cluster.ask(
        "sbatch", "--parsable", "-p", "hi", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 3"
    )
    run.cluster.wait_for(lambda: run.cluster.state(urgent) == "COMPLETED", "the urgent job")
    assert json.loads((run.folder / "STOPPED").read_text())["reason"] == "SIGTERM"
    run.comes_back(job, "preemption by a higher partition, from when its job is done")
    run.stop_and_compare(job)


def test_a_cancelled_job_has_saved(run: SlurmRun) -> None:
    job = run.submit()
    run.wait_for_steps()
    run.cluster.ask("scancel", job)
    run.cluster.wait_for(lambda: run.cluster.state(job) == "CANCELLED", "the job to be cancelled")
    run.cluster.wait_for(lambda: len(run.cluster.free_nodes()) == 2, "two free nodes")
    stopped = json.loads((run.folder / "STOPPED").read_text())
    assert stopped["reason"] == "SIGTERM"
    assert latest_checkpoint(run.folder / "checkpoints").name == f"step-{stopped['step']:08}"
    again = run.submit()
    run.comes_back(again, "scancel, from when it is submitted again")
    run.stop_and_compare(again)


def lose_for_long(
    run: SlurmRun, node: str, what: str, lose: Callable[[str], None], regain: Callable[[str], None]
) -> None:
    """Until slurm misses the node; the job runs again when it is back, and ends with the same weights."""
    job = run.submit()
    run.wait_for_steps()
    lose(node)
    run.cluster.wait_for(lambda: run.cluster.state(job) != "RUNNING", "slurm to miss the node")
    regain(node)
    run.comes_back(job, f"{what} of {node} until slurm misses it, from when it is back")
    run.stop_and_compare(job)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_loses_power(run: SlurmRun, node: str) -> None:
    """The first runs the batch script too; slurm finds out after its timeout, and queues the job again."""
    lose_for_long(run, node, "power cut", run.cluster.cut_power, run.cluster.start_node)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_is_back_before_slurm_misses_it(run: SlurmRun, node: str) -> None:
    job = run.submit()
    run.wait_for_steps()
    run.cluster.cut_power(node)
    run.cluster.start_node(node)
    run.comes_back(job, f"power cut of {node}, back at once")
    run.stop_and_compare(job)


def test_a_cable_is_out_for_a_moment(run: SlurmRun) -> None:
    """Shorter than anybody's patience: the run waits, and knows nothing of it."""
    job = run.submit()
    run.wait_for_steps()
    run.cluster.pull_cable("n2")
    time.sleep(3)
    run.cluster.plug_in("n2")
    run.comes_back(job, "network cable out for 3 s, from when it is back")
    run.stop_and_compare(job)
    assert "a start ended" not in run.log()


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_cable_is_pulled(run: SlurmRun, node: str) -> None:
    """Both ends go on computing, and cannot tell each other; slurm misses the node, and queues the job again."""
    lose_for_long(run, node, "network cable out", run.cluster.pull_cable, run.cluster.plug_in)


def test_a_killed_rank_is_started_again_in_the_same_job(run: SlurmRun) -> None:
    job = run.submit()
    run.wait_for_steps()
    victims = subprocess.run(
        ["pgrep", "-f", f"headrace train {run.config}"], capture_output=True, text=True, check=True
    )
    assert victims.stdout
    os.kill(int(victims.stdout.split()[-1]), 9)
    run.comes_back(job, "kill -9 of a rank")
    assert run.log().count("a start ended with status") == 1
    run.stop_and_compare(job)


def test_a_partition_that_does_not_exist(run: SlurmRun) -> None:
    command = [*HEADRACE, "launch", str(run.config), "--nodes", "2", "--sbatch", "partition=nowhere", "run.name=job"]
    done = subprocess.run(command, env=run.cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"headrace: error: slurm refused {run.folder}/job.sbatch: ")
    assert "invalid partition specified: nowhere" in line
