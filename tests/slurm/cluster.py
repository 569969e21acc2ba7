"""A real slurm of two nodes on this machine, of Debian's packages slurm-wlm and munge, without systemd.

Each node is a process namespace of its own: killing its first process is a power cut, which takes all that ran on the
node with it, at once and without a word.
"""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/ctld.pid
SlurmdLogFile={folder}/%n.log
SlurmctldLogFile={folder}/ctld.log
SlurmdParameters=config_overrides
KillWait=5
KillOnBadExit=1
SlurmctldTimeout=10
SlurmdTimeout=10
JobRequeue=1
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=p Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=8
PartitionName=hi Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Starts its daemons at once; `stop` ends them.

    Args:
        folder: where daemons keep their state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=platform.node(), folder=folder))
        # Names of nodes need not be known to the system: processes meet at the machine's own address.
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self._own_munged = _start_munged()
        self._controller = subprocess.Popen(["slurmctld", "-D", "-f", str(conf)], env=self.environment, **_QUIET)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.free_nodes() == set(NODES), "both nodes to be idle")

    def start_node(self, node: str) -> None:
        """Power on."""
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "slurmd", "-D", "-N", node]
        self._nodes[node] = subprocess.Popen(command, env=self.environment, **_QUIET)

    def cut_power(self, node: str) -> None:
        """All processes of a node are gone."""
        self._nodes[node].kill()
        self._nodes[node].wait()

    def free_nodes(self) -> set[str]:
        """The nodes that could take a job now."""
        listed = self.ask("sinfo", "-h", "-N", "-p", "p", "-o", "%N %t").split("\n")
        return {line.split()[0] for line in listed if line.endswith(" idle")}

    def ask(self, *command: str) -> str:
        """What a command prints; slurm's own find the cluster."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED ... of a job."""
        words = dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", job).split())
        return words.get("JobState", "")

    def wait_for(self, done, what: str, seconds: float = 90.0) -> None:  # type: ignore[no-untyped-def]
        """Wait until `done()`, and fail after so many seconds."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{self.ask('squeue')}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End all daemons and what they run."""
        for node in self._nodes:
            self.cut_power(node)
        self._controller.terminate()
        self._controller.wait()
        if self._own_munged:
            subprocess.run(["munged", "--stop"], check=False, **_QUIET)


_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _start_munged() -> bool:
    """Whether munged had to be started."""
    if subprocess.run(["munge", "-n"], check=False, **_QUIET).returncode == 0:
        return False
    Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    as_munge = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups"]
    subprocess.run([*as_munge, "munged"], check=True, **_QUIET)
    return True
