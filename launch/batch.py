"""A run on a cluster: the batch script for slurm, and its submission."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

ALLOWED = re.compile(r"[A-Za-z0-9._/@:+=,%-]+")
LOGS = "logs"
# Longer than any partition's grace time between SIGTERM and the end of a preempted job.
SLURMS_TURN_S = 1800
# Between looks at a run folder that is in use: a file system may need minutes to let go of what a lost node held.
WAITS_S = (1, 2, 5, 10, 20, 60, 60, 60, 60)
LOOK_EVERY_S = 5
MINUTE_S = 60
# What the script says itself and depends on, and what would make several jobs of one run.
OWN_OPTIONS = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus-per-node",
    "time",
    "signal",
    "requeue",
    "no-requeue",
    "array",
)
# Each may be set otherwise where the job is submitted: slurm passes the environment on.
NCCL_SETTINGS = {
    "NCCL_DEBUG": "WARN",  # what NCCL knows of an error stands in the rank's log
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails or times out ends its process
    "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that the flight recorder keeps, for logs/hang.txt
}


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What a job asks of slurm.

    Attributes:
        nodes, gpus_per_node: machines, and on each as many processes with a GPU each; 0 GPUs: `tasks_per_node`
            processes on CPUs.
        tasks_per_node: processes on each node, where there are no GPUs.
        time: limit of one job, as slurm writes it; empty: the partition's.
        signal_ahead_s: so long before the limit the run is asked to save and stop, and is queued again.
        crash_limit: starts in a row that end without a new step before the job gives up, and jobs in a row that reach
            their time limit so before the run does.
        stall_minutes: so long without a new step, start, evaluations and saves included, before a start is killed and
            followed by another; 0: never.
        options: further `#SBATCH` options as (name, value), such as `("partition", "gpu")`.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    time: str = ""
    signal_ahead_s: int = 180
    crash_limit: int = 3
    stall_minutes: int = 60
    options: tuple[tuple[str, str], ...] = ()

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * (self.gpus_per_node or self.tasks_per_node)

    def problems(self) -> list[str]:
        """Every value out of range, and every one that slurm or a shell might read as something else."""
        found = [
            f"--{name.replace('_', '-')}={getattr(self, name)} must be at least {least}"
            for name, least in (
                ("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("signal_ahead_s", 1), ("crash_limit", 1),
                ("stall_minutes", 0),
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        limit_s = seconds(self.time)
        if self.time and limit_s is None:
            found.append(f"--time={self.time!r} is no time as slurm writes it: give minutes, h:mm:ss or d-hh:mm:ss")
        elif limit_s is not None and self.signal_ahead_s >= limit_s:
            found.append(f"--signal-ahead={self.signal_ahead_s} s must be below --time, {limit_s} s; set either")
        for name, value in self.options:
            if not re.fullmatch(r"[a-z][a-z-]*", name) or (value and not ALLOWED.fullmatch(value)):
                found.append(f"--sbatch {name}={value!r} may hold letters, digits and ._/@:+=,%- alone")
            elif name in OWN_OPTIONS:
                found.append(f"--sbatch {name}={value!r} goes against what the script itself asks for; leave it out")
        return found


def seconds(time: str) -> int | None:
    """Of a time limit as slurm writes it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`; None: it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def batch_script(config: BatchConfig, run: Path, name: str, steps: int, command: list[str], folder: Path) -> str:
    """The text of a batch script that starts `command` as one task a process, again and again until the run is done.

    Ahead of the time limit it asks the run to stop, by the file STOP, and queues the job again; what has not stopped
    shortly before the limit, such as a start that is still loading, is killed first. A start that ends by itself is
    followed by another, in the same job, unless `crash_limit` of them in a row came to no step that none had come to
    before; one that makes no step for `stall_minutes` is killed. After SIGTERM (preemption, `scancel`, a failed node)
    it leaves the queueing to slurm: slurm sends it to the processes of the run alone, and looks at the job again some
    time later; a job that has ended by then is not queued again.

    Args:
        run: the run folder.
        name: of the run.
        steps: of the whole run: one that was finished with fewer is not.
        command: `headrace train ...`.
        folder: where the command is to run.

    Raises:
        UserError: slurm could not take the name of the run folder.
    """
    if not ALLOWED.fullmatch(str(run)):
        raise UserError(f"run folder {run}: slurm takes letters, digits and ._/@:+=,%- alone; choose another run.root")
    options = [
        ("job-name", name),
        ("nodes", str(config.nodes)),
        ("ntasks-per-node", str(config.gpus_per_node or config.tasks_per_node)),
        *([("gpus-per-node", str(config.gpus_per_node))] if config.gpus_per_node else []),
        *([("time", config.time), ("signal", f"B:USR1@{config.signal_ahead_s}")] if config.time else []),
        ("output", f"{run / LOGS}/job-%j.log"),
        ("open-mode", "append"),
        *config.options,
    ]
    words = {
        "folder": folder, "run": run, "command": command, "python": [sys.executable, "-m", "headrace"],
        "logs": f"{run / LOGS}/job-%j-rank-%t.log",
    }  # fmt: skip
    quoted = {
        key: shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))
        for key, value in words.items()
    }
    head = "\n".join(f"#SBATCH --{key}" + (f"={value}" if value else "") for key, value in options)
    nccl = [f'export {name}="${{{name}:-{value}}}"' for name, value in NCCL_SETTINGS.items()]
    numbers = {
        "steps": steps,
        "crash_limit": config.crash_limit,
        "late_s": config.signal_ahead_s - min(20, config.signal_ahead_s // 4),
        "stall_s": MINUTE_S * config.stall_minutes,
        "slurms_turn_s": SLURMS_TURN_S,
        "waits_s": " ".join(map(str, WAITS_S)),
        "look_every_s": LOOK_EVERY_S,
        "logs_folder": LOGS,
        "jobs": f"{LOGS}/jobs-without-a-step",
        "settings": "\n".join(nccl) if config.gpus_per_node else "",
    }
    return f"#!/bin/bash\n{head}\n#SBATCH --requeue\n" + SCRIPT.format(**quoted, **numbers)


SCRIPT = """
set -u
cd {folder} || exit 1
run={run}
{settings}
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi  # srun asks by itself
status() {{ {python} status "$run" --json 2>/dev/null; }}
step_in() {{ local n; n=$(sed -n 's/.*"step": \\([0-9]*\\),.*/\\1/p'); echo "${{n:-0}}"; }}
step() {{ status | step_in; }}
finished() {{
  local steps='{steps},'
  if [ $result -eq 0 ]; then steps=''; fi  # a start that ended well has noted how many it was asked for
  status | grep -q '"state": "finished".*"steps": '"$steps"
}}
running() {{ status | grep -q '"state": "running"'; }}

kill_step() {{
  scancel --quiet --signal=KILL "$SLURM_JOB_ID.$1"
  sleep {look_every_s}
  kill -9 "$2" 2>/dev/null
}}

# An srun whose node was away for a moment waits for it long after the run has ended: such a step is cancelled, and so
# is one that does nothing, whatever it waits for.
watch_over() {{
  local seen='' missed=0 told step last='' since=$SECONDS
  while sleep {look_every_s}; do
    told=$(status)
    step=$(step_in <<<"$told")
    if [ -n "$told" ] && [ "$step" != "$last" ]; then last=$step since=$SECONDS; fi
    if [ {stall_s} -gt 0 ] && [ $((SECONDS - since)) -ge {stall_s} ]; then
      echo "no new step for {stall_s} s: killed"
      kill_step "$1" "$2"
      return
    fi
    case $told in
      *'"state": "running"'*) seen=1 missed=0 ;;
      *'"state": '*) if [ -n "$seen" ]; then missed=$((missed + 1)); fi ;;  # no answer says nothing
    esac
    if [ $missed -ge 3 ]; then
      echo "the run has ended, its step $1 has not: cancelled"
      scancel --quiet "$SLURM_JOB_ID.$1"
      sleep {look_every_s}
      kill -9 "$2" 2>/dev/null
      return
    fi
  done
}}

asked='' ended='' alarm='' srun=''
tell_time() {{
  if [ -e "$run/STOP" ]; then return; fi  # the user was first
  asked=1
  if [ -z "$srun" ]; then return; fi  # another job may have the run
  echo time limit >"$run/STOP"
  {{ sleep {late_s}; kill -USR2 $$; }} >/dev/null 2>&1 & alarm=$!
}}
trap tell_time USR1
trap 'echo "not stopped in time: killed"; kill_step $number $srun' USR2
trap 'ended=1' TERM

queue_again() {{
  reached=$(step) jobs=0
  if [ "$reached" -le "$began" ]; then jobs=$(($(cat "$run/{jobs}" 2>/dev/null || echo 0) + 1)); fi
  mkdir -p "$run/{logs_folder}" && echo $jobs >"$run/{jobs}"
  if [ $jobs -ge {crash_limit} ]; then
    echo "$jobs jobs in a row came to their time limit without a new step: given up; raise --time"
    exit 1
  fi
  echo "asked to stop ahead of the time limit after step $reached: queued again"
  for pause in 1 5 10; do scontrol requeue "$SLURM_JOB_ID" && exit 0; sleep $pause; done
  exit 1
}}

# Another job may be at it; or processes of this one before it was queued again, on a node that slurm has lost.
wait_for_others() {{
  for pause in {waits_s}; do
    if [ -n "$ended$asked" ] || ! running; then break; fi
    sleep $pause & wait $!
  done
  if [ -n "$ended" ]; then exit 143; fi
  if [ -n "$asked" ]; then queue_again; fi
  if running; then
    echo "$run is running $(status | sed -n 's/.*"detail": "\\([^"]*\\).*/\\1/p'): cancel that job, or wait for it"
    exit 1
  fi
}}

crashes=0 number=-1 furthest=$(step)
began=$furthest
while :; do
  wait_for_others  # before each start: two jobs that begin at once both find nobody
  # Of a job before this one, if its start crashed ahead of obeying, or its node.
  if grep -qsx "time limit" "$run/STOP"; then rm "$run/STOP"; fi
  rm -f "$run/STOPPED"
  srun --overlap --kill-on-bad-exit=1 --open-mode=append --output={logs} {command} &
  srun=$! number=$((number + 1))
  if [ -n "$asked" ]; then tell_time; fi  # there was nothing to stop yet
  watch_over $number $srun & watchdog=$!
  while wait $srun; result=$?; kill -0 $srun 2>/dev/null; do :; done  # a trap ends a wait
  srun=''
  kill $watchdog $alarm 2>/dev/null
  if [ -n "$ended" ]; then exit 143; fi
  if finished; then break; fi
  if [ -n "$asked" ]; then queue_again; fi
  if grep -qs SIGTERM "$run/STOPPED"; then
    echo "ended by SIGTERM after step $(step): what follows is slurm's"
    SECONDS=0
    until [ -n "$ended" ] || [ $SECONDS -ge {slurms_turn_s} ]; do sleep {look_every_s} & wait $!; done
    exit 143
  fi
  if [ -e "$run/STOPPED" ]; then echo "stopped after step $(step)"; exit 0; fi
  reached=$(step)
  if [ "$reached" -gt "$furthest" ]; then crashes=0 furthest=$reached; else crashes=$((crashes + 1)); fi
  echo "a start ended with status $result after step $reached"
  if [ $crashes -ge {crash_limit} ]; then
    echo "$crashes starts in a row ended without a new step: given up; the ranks' logs are beside this one"
    exit 1
  fi
  if [ $crashes -gt 0 ]; then sleep $((2 ** crashes < 60 ? 2 ** crashes : 60)) & wait $!; fi  # what is wrong may pass
done
rm -f "$run/STOP"
echo "finished after step $(step)"
"""


def write_script(text: str, run: Path) -> Path:
    """The script in its run folder, readable by its owner alone."""
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    (run / LOGS).mkdir(exist_ok=True)
    path = run / "job.sbatch"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    return path


def submit(path: Path) -> str:
    """The number of the job that slurm made of a script.

    Raises:
        UserError: there is no slurm here, or it refused the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not on this machine; submit {path} where slurm is")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(f"slurm refused {path}: {reason}")
    return done.stdout.strip().partition(";")[0]
