"""A one-node SLURM on this machine for the duration of a test. Needs root and Debian's `PACKAGES`."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CPUS = 4  # as SLURM is told; jobs may share fewer real ones

# Jobs in `yielding` are preempted by those in `urgent`, after a warning.
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/node.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=5
ReturnToService=2
NodeName=localhost CPUs={cpus} State=UNKNOWN
PartitionName=plain Nodes=ALL PriorityTier=5 PreemptMode=OFF Default=YES
PartitionName=yielding Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """What this machine lacks to run a cluster."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start the daemons, point every SLURM command at them, and stop them in the end."""
    for name in ("munge", "controller", "node"):
        (folder / name).mkdir(parents=True)
    for path in (folder, folder.parent):  # munge's own user has to get there
        path.chmod(0o755)
    shutil.chown(folder / "munge", "munge", "munge")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, cpus=CPUS))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    daemons = [
        ["runuser", "-u", "munge", "--", "munged", "--foreground", f"--socket={folder}/munge/socket", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c", "-N", "localhost"],
    ]
    running = []
    try:
        for command in daemons:
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        _wait_for_the_node()
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(2)
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_for_the_node() -> None:
    for _ in range(60):
        done = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False)
        if "idle" in done.stdout:
            return
        time.sleep(1)
    raise TimeoutError("the cluster's node does not become idle")
