"""The batch script, run by bash with a stand-in for srun: done, asked to stop, crashing, ended by slurm."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from headrace.errors import UserError
from headrace.launch import batch
from headrace.launch.batch import BatchConfig, batch_script, seconds, submit, write_script
from headrace.launch.cli import main
from tiny import CONFIG

# Goes back to the step in the file `saved`, if it is there; adds so many steps as the file `steps` says for this start
# (its last number: for all later ones), saves after the tenth, then does what the file `then` says.
SRUN = """#!{python}
import fcntl, json, os, pathlib, sys, time
run = pathlib.Path("runs/job")
run.mkdir(parents=True, exist_ok=True)
(run / "config.toml").write_text("[train]\\nsteps = 10\\n")
metrics = run / "metrics.jsonl"
saved, starts = pathlib.Path("saved"), pathlib.Path("starts")
if saved.exists() and metrics.exists():
    metrics.write_text("".join(metrics.read_text().splitlines(True)[: int(saved.read_text())]))
done = metrics.read_text().count("step") if metrics.exists() else 0
counts = [int(count) for count in pathlib.Path("steps").read_text().split()]
steps = counts[min(len(starts.read_text().splitlines()) if starts.exists() else 0, len(counts) - 1)]
with metrics.open("a") as file:
    for step in range(done + 1, min(done + steps, 10) + 1):
        file.write(json.dumps({{"kind": "train", "step": step, "tokens": step}}) + "\\n")
if done + steps >= 10 and not pathlib.Path("unsaved").exists():
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").touch()
with starts.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
then = pathlib.Path("then").read_text()
if then == "wait":
    while not (run / "STOP").exists():
        time.sleep(0.02)
    (run / "STOP").unlink()
    (run / "STOPPED").write_text(json.dumps({{"step": done + steps, "reason": "the file STOP"}}))
    then = "0"
if then == "end":  # rank 0 is gone, and srun waits for another node
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(2)
    pathlib.Path("then").write_text("0")
    while not pathlib.Path("cancelled").exists():
        time.sleep(0.02)
    sys.exit(1)
if then == "idle":  # it does nothing, and still has the run
    pathlib.Path("then").write_text("0")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while not pathlib.Path("cancelled").exists():
            time.sleep(0.02)
    sys.exit(137)
if then == "deaf":
    while not pathlib.Path("cancelled").exists():
        time.sleep(0.02)
    sys.exit(137)
if then == "crash asked":
    while not (run / "STOP").exists():
        time.sleep(0.02)
    sys.exit(9)
if then == "away":  # for a while nobody can tell how the run is
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(2)
        (run / "config.toml").rename(run / "config.away")
        time.sleep(3)
        (run / "config.away").rename(run / "config.toml")
    pathlib.Path("then").write_text("0")
    sys.exit(1)
if then == "term":
    (run / "STOPPED").write_text(json.dumps({{"step": done + steps, "reason": "SIGTERM"}}))
    then = "0"
sys.exit(int(then))
"""
SCONTROL = '#!/bin/bash\necho "$@" > requeued\n'
SCANCEL = '#!/bin/bash\necho "$@" > cancelled\n'


def start(folder: Path, steps: int | str, then: str, total: int = 10, **more: int) -> subprocess.Popen[str]:
    """The script in `folder`; `then` is a status of srun, or `wait`."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (
        ("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL), ("scancel", SCANCEL)
    ):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "steps").write_text(str(steps))
    (folder / "then").write_text(then)
    config = BatchConfig(nodes=2, time="1:00:00", **more)  # type: ignore[arg-type]
    command = ["headrace", "train", "my config.toml", "run.name=job"]
    path = folder / "job.sbatch"
    path.write_text(batch_script(config, Path("runs/job"), "job", total, command, folder))
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_run_that_finishes(tmp_path: Path) -> None:
    job = start(tmp_path, steps=10, then="0")
    assert job.communicate(timeout=60)[0] == "finished after step 10\n"
    assert job.returncode == 0
    (command,) = (tmp_path / "starts").read_text().splitlines()
    assert command.endswith("headrace train my config.toml run.name=job")
    again = start(tmp_path, steps=10, then="0")
    assert again.communicate(timeout=60)[0] == "finished after step 10\n"
    assert len((tmp_path / "starts").read_text().splitlines()) == 2  # it may have more steps to go by now


def test_a_run_with_more_steps_than_it_had_goes_on(tmp_path: Path) -> None:
    """What is on record says finished, and the command asks for more."""
    run = tmp_path / "runs" / "job"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "checkpoints" / "step-00000004" / "manifest.json").touch()
    (run / "config.toml").write_text("[train]\nsteps = 4\n")
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"kind": "train", "step": {n}, "tokens": 1}}\n' for n in (1, 2, 3, 4))
    )
    assert start(tmp_path, steps=6, then="0").communicate(timeout=60)[0] == "finished after step 10\n"


def test_a_finished_run_whose_further_steps_are_refused_is_not_finished(tmp_path: Path) -> None:
    """Its folder still says 10 steps, as long as no start has gone on."""
    assert start(tmp_path, steps=10, then="0").communicate(timeout=60)[0] == "finished after step 10\n"
    job = start(tmp_path, steps=0, then="2", total=20, crash_limit=2)
    told = job.communicate(timeout=60)[0]
    assert "2 starts in a row ended without a new step: given up" in told
    assert job.returncode == 1


def hold(run: Path) -> IO[str]:
    """The lock of a run folder, as a process of the run has it."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text("[train]\nsteps = 10\n")
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write("process 7 on node3")
    lock.flush()
    return lock


@pytest.mark.fault("the same run submitted to slurm twice", "the second job ends; the first is not disturbed")
def test_a_second_job_of_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "WAITS_S", (0, 1))
    with hold(tmp_path / "runs" / "job"):
        job = start(tmp_path, steps=4, then="0")
        told = "runs/job is running as process 7 on node3: cancel that job, or wait for it\n"
        assert job.communicate(timeout=60)[0] == told
    assert job.returncode == 1
    assert not (tmp_path / "starts").exists()


def test_a_job_waits_for_what_a_lost_node_holds(tmp_path: Path) -> None:
    with hold(tmp_path / "runs" / "job"):
        job = start(tmp_path, steps=10, then="0")
        time.sleep(1.0)
        assert not (tmp_path / "starts").exists()
    assert job.communicate(timeout=60)[0] == "finished after step 10\n"


def test_a_job_that_waits_for_another_does_not_stop_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "job"
    with hold(run):
        job = start(tmp_path, steps=4, then="0")
        while not Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text():  # it listens before it starts anything
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.communicate(timeout=60)[0].endswith("queued again\n")
    assert (tmp_path / "requeued").exists()
    assert not (run / "STOP").exists()
    assert not (tmp_path / "starts").exists()


def test_the_second_of_two_jobs_that_begin_at_once_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nobody; the steps of the first are none of the second's."""
    monkeypatch.setattr(batch, "WAITS_S", (0, 0.1))
    job = start(tmp_path, steps=1, then="deaf", total=20)
    wait_for(tmp_path / "starts")
    with hold(tmp_path / "runs" / "job"):
        (tmp_path / "cancelled").touch()
        assert "runs/job is running as process 7 on node3" in job.communicate(timeout=60)[0]
    assert job.returncode == 1
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_number_of_steps_that_was_changed_since(tmp_path: Path) -> None:
    """Every start reads the configuration, and the job may have been submitted long ago."""
    job = start(tmp_path, steps=10, then="0", total=7)
    assert job.communicate(timeout=60)[0] == "finished after step 10\n"


@pytest.mark.fault("a batch job's start that does not stop ahead of the limit", "killed just before it; queued again")
def test_what_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    job = start(tmp_path, steps=4, then="deaf", signal_ahead_s=2)
    wait_for(tmp_path / "starts")
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=60)[0].splitlines()
    assert told[0] == "not stopped in time: killed"
    assert told[1].endswith("after step 4: queued again")
    assert (tmp_path / "requeued").exists()


def test_ahead_of_the_limit_it_saves_and_is_queued_again(tmp_path: Path) -> None:
    job = start(tmp_path, steps=4, then="wait")
    wait_for(tmp_path / "starts")
    job.send_signal(signal.SIGUSR1)
    assert "asked to stop ahead of the time limit after step 4: queued again" in job.communicate(timeout=60)[0]
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


@pytest.mark.fault("a crash between slurm's signal and the stop it asks for", "the job is queued again and goes on")
def test_the_next_job_does_not_obey_what_this_one_was_told(tmp_path: Path) -> None:
    job = start(tmp_path, steps="4 6", then="crash asked")
    wait_for(tmp_path / "starts")
    job.send_signal(signal.SIGUSR1)
    assert "asked to stop ahead of the time limit after step 4: queued again" in job.communicate(timeout=60)[0]
    again = start(tmp_path, steps="4 6", then="0")
    assert again.communicate(timeout=60)[0] == "finished after step 10\n"


def test_a_stop_of_the_users_comes_before_the_time_limit(tmp_path: Path) -> None:
    job = start(tmp_path, steps="4 2", then="crash asked")
    wait_for(tmp_path / "starts")
    (tmp_path / "runs" / "job" / "STOP").touch()
    (tmp_path / "then").write_text("wait")
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=60)[0].splitlines()
    assert told[-1].startswith("stopped after step")
    assert not (tmp_path / "requeued").exists()


def test_jobs_that_come_to_their_limit_without_a_step_end(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "starts").unlink(missing_ok=True)
        (tmp_path / "requeued").unlink(missing_ok=True)
        job = start(tmp_path, steps=2 if number == 0 else 0, then="wait", crash_limit=2)
        wait_for(tmp_path / "starts")
        job.send_signal(signal.SIGUSR1)
        told = job.communicate(timeout=60)[0]
        assert (tmp_path / "requeued").exists() == (number < 2)
    assert "2 jobs in a row came to their time limit without a new step: given up; raise --time" in told
    assert job.returncode == 1


def test_a_stop_of_the_users_is_no_crash(tmp_path: Path) -> None:
    job = start(tmp_path, steps=4, then="wait")
    wait_for(tmp_path / "starts")
    (tmp_path / "runs" / "job" / "STOP").touch()
    assert job.communicate(timeout=60)[0] == "stopped after step 4\n"
    assert job.returncode == 0
    assert not (tmp_path / "requeued").exists()


def test_crashes_that_make_headway_go_on(tmp_path: Path) -> None:
    """Three steps a start: four starts, none of which is the third in a row without a new step."""
    job = start(tmp_path, steps=3, then="9", crash_limit=1)
    told = job.communicate(timeout=60)[0].splitlines()
    assert told == [f"a start ended with status 9 after step {step}" for step in (3, 6, 9)] + ["finished after step 10"]


def test_steps_done_again_are_no_headway(tmp_path: Path) -> None:
    """Each start ends after another step than the one before, and none after the first comes further."""
    (tmp_path / "saved").write_text("3")
    job = start(tmp_path, steps="5 1 2 1 2 1 2", then="9")
    told = job.communicate(timeout=60)[0].splitlines()
    assert told[:4] == [f"a start ended with status 9 after step {step}" for step in (5, 4, 5, 4)]
    assert "3 starts in a row ended without a new step: given up" in told[4]


def test_the_last_step_alone_finishes_no_run(tmp_path: Path) -> None:
    """Its checkpoint is not there yet."""
    (tmp_path / "unsaved").touch()
    job = start(tmp_path, steps=10, then="9")
    wait_for(tmp_path / "starts")
    (tmp_path / "unsaved").unlink()
    told = job.communicate(timeout=60)[0].splitlines()
    assert told[0] == "a start ended with status 9 after step 10"
    assert told[-1] == "finished after step 10"


@pytest.mark.fault("a batch job whose starts crash without a new step", "given up after the third")
def test_a_crash_loop_ends(tmp_path: Path) -> None:
    job = start(tmp_path, steps=0, then="9")
    told = job.communicate(timeout=60)[0]
    assert "3 starts in a row ended without a new step: given up" in told
    assert job.returncode == 1
    assert len((tmp_path / "starts").read_text().splitlines()) == 3


def test_what_slurm_ends_is_left_to_slurm(tmp_path: Path) -> None:
    job = start(tmp_path, steps=4, then="wait")
    wait_for(tmp_path / "starts")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "runs" / "job" / "STOP").touch()  # the tasks had the signal too, and saved
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert not (tmp_path / "requeued").exists()


def test_a_preempted_job_waits_for_slurm_to_queue_it(tmp_path: Path) -> None:
    """Slurm tells the tasks, not the script, and a job that ends in its grace time is not queued again."""
    job = start(tmp_path, steps=4, then="term")
    assert job.stdout is not None
    assert "ended by SIGTERM after step 4" in job.stdout.readline()
    assert job.poll() is None
    job.terminate()
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert not (tmp_path / "requeued").exists()


def test_a_step_that_outlives_its_run_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LOOK_EVERY_S", 0.3)
    job = start(tmp_path, steps=5, then="end")
    told = job.communicate(timeout=60)[0]
    assert "its step 0 has not: cancelled" in told
    assert (tmp_path / "cancelled").read_text() == "--quiet 77.0\n"
    assert told.endswith("finished after step 10\n")


@pytest.mark.fault("a batch job's start that does nothing, start-up included", "killed and started again")
def test_a_start_that_makes_no_step_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LOOK_EVERY_S", 0.3)
    monkeypatch.setattr(batch, "MINUTE_S", 2)
    job = start(tmp_path, steps=5, then="idle", stall_minutes=1)
    told = job.communicate(timeout=60)[0]
    assert "no new step for 2 s: killed" in told
    assert (tmp_path / "cancelled").read_text() == "--quiet --signal=KILL 77.0\n"
    assert told.endswith("finished after step 10\n")


def test_a_run_that_cannot_be_looked_at_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LOOK_EVERY_S", 0.3)
    job = start(tmp_path, steps=5, then="away")
    told = job.communicate(timeout=60)[0]
    assert "cancelled" not in told
    assert told.endswith("finished after step 10\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((("partition", "a\n#SBATCH --wrap=x"),), "--sbatch partition='a"),
        ((("comment", "$(touch x)"),), "--sbatch comment="),
        ((("account", 'a"b'),), "--sbatch account="),
        ((("Bad name", "x"),), "--sbatch Bad name="),
        ((("array", "0-3"),), "--sbatch array="),
        ((("signal", "USR2"),), "--sbatch signal="),
    ],
)
def test_values_that_a_shell_might_read_are_refused(options: tuple, message: str) -> None:
    (problem,) = BatchConfig(options=options).problems()
    assert problem.startswith(message)
    assert "\n" not in problem


def test_numbers_out_of_range_are_all_named() -> None:
    problems = BatchConfig(nodes=0, gpus_per_node=-1, crash_limit=0, time="1 hour").problems()
    assert [problem.partition("=")[0] for problem in problems] == [
        "--nodes",
        "--gpus-per-node",
        "--crash-limit",
        "--time",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-1", 176400), ("1-0:30", 88200), ("1-02:03:04", 93784)]
    + [(text, None) for text in ("", "x", "1:2:3:4", "1h", "-1", "1-", "1\n2")],
)
def test_times_as_slurm_writes_them(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


def test_a_signal_that_is_not_ahead_of_the_limit() -> None:
    assert BatchConfig(time="4").problems() == []
    (problem,) = BatchConfig(time="3").problems()
    assert problem == "--signal-ahead=180 s must be below --time, 180 s; set either"


def test_settings_of_nccl_are_there_where_there_are_gpus(tmp_path: Path) -> None:
    with_gpus, without = (
        batch_script(
            BatchConfig(gpus_per_node=gpus, options=(("exclusive", ""),)), Path("runs/job"), "job", 10, ["x"], tmp_path
        )
        for gpus in (8, 0)
    )
    assert 'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"\n' in with_gpus
    assert "NCCL" not in without
    assert "#SBATCH --exclusive\n" in without


def test_a_folder_slurm_cannot_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"choose another run.root"):
        batch_script(BatchConfig(), Path("my runs/job"), "job", 10, ["x"], tmp_path)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    options = ["launch", "tiny.toml", "--nodes", "2", "--gpus-per-node", "2", "--sbatch", "partition=gpu"]
    assert main([*options, "--dry-run", "run.name=a", "optimizer.groups=[{names='*', lr_scale=0.5}]"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n" in text
    assert """'optimizer.groups=[{names='"'"'*'"'"', lr_scale=0.5}]'""" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert not (tmp_path / "runs").exists()

    assert main(["launch", "tiny.toml", "--nodes", "3", "parallel.tp=2"]) == 2  # before anything is written
    assert not (tmp_path / "runs").exists()

    monkeypatch.setenv("PATH", "/usr/bin-that-is-not")
    assert main(options) == 2
    assert "sbatch is not on this machine; submit runs/tiny/job.sbatch" in capsys.readouterr().err
    assert stat.S_IMODE((tmp_path / "runs" / "tiny" / "job.sbatch").stat().st_mode) == 0o600


def test_what_slurm_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write_script("#!/bin/bash\n", tmp_path)
    with pytest.raises(UserError, match="invalid partition specified: x"):
        submit(path)
    tool.write_text("#!/bin/bash\necho '41;cluster'\n")
    assert submit(path) == "41"
