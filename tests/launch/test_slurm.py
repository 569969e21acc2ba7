"""Processes that srun starts: their group from slurm's variables, and a run of two of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.errors import UserError
from headrace.launch.slurm import adopt_slurm, expand_counts, expand_hosts
from tiny import tiny_file

TASK = {
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("gpu[01-03,7],login2", ["gpu01", "gpu02", "gpu03", "gpu7", "login2"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("a-b.c[9-11]x", ["a-b.c9x", "a-b.c10x", "a-b.c11x"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a[", "a]b", "a[x-y]", "a,,b", "a[1-2", "a[[1]]", "a[2-1]"])
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(UserError, match="no list of hosts"):
        expand_hosts(text)


def test_tasks_by_node() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="no list of tasks"):
        expand_counts("2(3)")
    environment = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
    adopt_slurm(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "4"


def test_a_task_of_a_step() -> None:
    environment = dict(TASK)
    adopt_slurm(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["5", "8", "1", "gpu07", str(20000 + (123456 + 1009 * 2) % 10000)]


@pytest.mark.parametrize("binding", [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_GPU_BIND": "single:1"}])
def test_a_task_bound_to_a_gpu_takes_its_first(binding: dict[str, str]) -> None:
    environment = TASK | binding
    adopt_slurm(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("5", "0")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_JOB_ID": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {**TASK, "SLURM_NTASKS": "1"},
        {**TASK, "RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_others_are_left_alone(given: dict[str, str]) -> None:
    """A batch script, of several tasks too; a job of one task; what torchrun started inside a job."""
    environment = dict(given)
    adopt_slurm(environment)
    assert environment == given


def test_given_addresses_stay_and_missing_ones_are_named() -> None:
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"}
    adopt_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4242")
    with pytest.raises(UserError, match="SLURM_LOCALID is not set"):
        adopt_slurm({name: value for name, value in TASK.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"SLURM_NTASKS": "x"},
        {"SLURM_NTASKS": "-2"},
        {"SLURM_PROCID": ""},
        {"SLURM_PROCID": "8"},
        {"SLURM_LOCALID": "0x1"},
        {"SLURM_JOB_ID": "12_3"},
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_NODEID": "²"},
        {"SLURM_NODEID": "2"},
    ],
    ids=str,
)
def test_what_is_no_number_is_named(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    environment = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1", **wrong}
    with pytest.raises(UserError, match=f"{name}='?{value}'?") as caught:
        adopt_slurm(environment)
    assert "\n" not in str(caught.value)
    assert "RANK" not in environment


def test_two_tasks_train_together(tmp_path: Path, data: Path) -> None:
    config = tiny_file(tmp_path, data)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    job = {**TASK, "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "headrace", "train", str(config)],
            env={**plain, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert "step 6/6" in told[0]
    assert "step 6/6" not in told[1]
