"""A real slurm of two nodes on this machine, of Debian's packages slurm-wlm and munge, without systemd.

Each node is a process namespace of its own: killing its first process is a power cut, which takes all that ran on the
node with it, at once and without a word. It is a network namespace too, with a cable to a switch (a bridge).
"""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
SWITCH, CONTROLLER = "headrace", "10.77.0.254"
CONF = """\
ClusterName=lab
SlurmctldHost={host}({controller})
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
NodeName=n[1-2] NodeHostname={host} NodeAddr=10.77.0.[1-2] Port=[17001-17002] CPUs=2 RealMemory=4000 State=UNKNOWN
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
        conf.write_text(CONF.format(host=platform.node(), folder=folder, controller=CONTROLLER))
        # Names of nodes are not known to the system: processes meet at the first's address, on its one cable.
        network = {"MASTER_ADDR": NODES["n1"], "GLOO_SOCKET_IFNAME": CABLE}
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1", **network}
        _remove_network()
        _lay_network()
        self._own_munged = _start_munged()
        self._controller = subprocess.Popen(["slurmctld", "-D", "-f", str(conf)], env=self.environment, **_QUIET)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        for node in NODES:
            self.start_node(node)
        try:
            self.wait_for(lambda: self.free_nodes() == set(NODES), "both nodes to be idle")
        except BaseException:
            self.stop()
            raise

    def start_node(self, node: str) -> None:
        """Power on."""
        # Not `ip netns exec`, which mounts /sys anew: slurmd needs the cgroups there.
        network = ["nsenter", f"--net=/run/netns/{_namespace(node)}"]
        own_processes = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [*network, *own_processes, "slurmd", "-D", "-N", node]
        self._nodes[node] = subprocess.Popen(command, env=self.environment, **_QUIET)

    def cut_power(self, node: str) -> None:
        """All processes of a node are gone."""
        self._nodes[node].kill()
        self._nodes[node].wait()

    def pull_cable(self, node: str) -> None:
        """Nothing reaches or leaves a node, and nobody is told."""
        _ip("link", "set", _port(node), "down")

    def plug_in(self, node: str) -> None:
        """The cable is back."""
        _ip("link", "set", _port(node), "up")

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
        _remove_network()
        if self._own_munged:
            subprocess.run(["munged", "--stop"], check=False, **_QUIET)


# The node's end of its cable.
CABLE = "cable"


def _namespace(node: str) -> str:
    return f"{SWITCH}-{node}"


def _port(node: str) -> str:
    return f"{SWITCH}-{node}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _lay_network() -> None:
    _ip("link", "add", SWITCH, "type", "bridge")
    _ip("address", "add", f"{CONTROLLER}/24", "dev", SWITCH)
    _ip("link", "set", SWITCH, "up")
    for node, address in NODES.items():
        inside = ("-n", _namespace(node))
        _ip("netns", "add", _namespace(node))
        _ip("link", "add", _port(node), "type", "veth", "peer", "name", CABLE, "netns", _namespace(node))
        _ip("link", "set", _port(node), "master", SWITCH, "up")
        _ip(*inside, "address", "add", f"{address}/24", "dev", CABLE)
        for link in (CABLE, "lo"):
            _ip(*inside, "link", "set", link, "up")


def _remove_network() -> None:
    """Also what an earlier cluster left that was killed."""
    for words in (*(("netns", "del", _namespace(node)) for node in NODES), ("link", "del", SWITCH)):
        subprocess.run(["ip", *words], check=False, **_QUIET)


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
