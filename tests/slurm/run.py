"""Test on a real SLURM on this machine: jobs that are preempted, killed and requeued, or out of time.

Each must resume where it was, in the same folder, and end with the weights of an undisturbed one.
Run by `make test-slurm`, as root, with the packages in `cluster.PACKAGES`. Takes some ten minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import CPUS, PACKAGES, cluster, missing
from safetensors.numpy import load_file

EXPERIMENT = ["stream=split_digits", "model=mlp", "model.widths=[64]", "strategy=ewc", "tracker=local", "device=cpu"]
LAUNCHER = ["hydra/launcher=slurm", "gpus_per_node=0", "cpus_per_task=1", "mem_gb=null", "poll_s=2"]


@dataclass
class Case:
    """One job, and what happens to it."""

    name: str
    partition: str
    minutes: int = 60
    driver: "subprocess.Popen[str] | None" = None

    @property
    def folder(self) -> Path:
        (folder,) = [path for path in Path(self.name).iterdir() if path.is_dir() and not path.name.startswith(".")]
        return folder

    def start(self, epochs: int) -> None:
        settings = [f"partition={self.partition}", f"timeout_min={self.minutes}", "signal_delay_s=30"]
        launcher = [word if "/" in word else f"hydra.launcher.{word}" for word in (*LAUNCHER, *settings)]
        words = [*EXPERIMENT, f"trainer.epochs={epochs}", f"output_root={self.name}", *launcher]
        command = [sys.executable, "-m", "cl_runner", "-m", *words]
        print("$ cl-runner -m", " ".join(words), flush=True)
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def step(self) -> int:
        files = list(Path(self.name).glob("*/status.json"))
        return json.loads(files[0].read_text()).get("step") or 0 if files else 0

    def job(self) -> str:
        """Its number in the queue."""
        listing = ["squeue", "--noheader", "--format=%i %k"]
        queue = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
        return next(line.split()[0] for line in queue if line.endswith(f"/{self.name}"))

    def weights(self) -> dict[str, bytes]:
        return {name: value.tobytes() for name, value in load_file(self.folder / "model.safetensors").items()}

    def end(self) -> bool:
        """Wait for the sweep and show its output. Returns whether it was interrupted and is done all the same."""
        assert self.driver is not None
        said, _ = self.driver.communicate()
        log = (self.folder / "run.log").read_text()
        print(f"\n--- {self.name}: exit status {self.driver.returncode}\n{said.strip()}")
        print("\n".join(line for line in log.splitlines() if "going on" in line or "stopped by" in line))
        return self.driver.returncode == 0 and ("going on" in log) == (self.name != "alone")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1500, help="a task; a job has to last two minutes or more")
    epochs = parser.parse_args().epochs
    if lacking := missing():
        print(f"make test-slurm needs {', '.join(lacking)}; as root: apt-get install {' '.join(PACKAGES)}")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    with cluster(folder / "slurm"):
        os.chdir(folder)
        preempted, killed = Case("preempted", "yielding"), Case("killed_and_requeued", "plain")
        timed, alone = Case("out_of_time", "plain", minutes=2), Case("alone", "plain")
        cases = (preempted, killed, timed, alone)
        for case in cases[:3]:
            case.start(epochs)
        _until(lambda: preempted.step() > 0 and killed.step() > 0)
        time.sleep(5)
        _shell(f"sbatch --partition=urgent --cpus-per-task={CPUS - 1} --output=/dev/null --wrap='sleep 5'")
        _shell(f"scontrol requeue {killed.job()}")
        alone.start(epochs)
        _until(lambda: all(case.driver and case.driver.poll() is not None for case in cases))
        ended = [case.end() for case in cases]
        equal = [case.weights() == alone.weights() for case in cases]
    print(f"\n{sum(ended)} of {len(cases)} ended as they should, {sum(equal)} with the weights of the one left alone")
    print(f"(files: {folder})")
    return int(not all(ended) or not all(equal))


def _shell(command: str) -> None:
    print(f"$ {command}", flush=True)
    subprocess.run(command, shell=True, check=True)


def _until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, releasing requeued jobs, which SLURM holds for two minutes, and printing queue changes."""
    shown = ""
    while not condition():
        time.sleep(2)
        listing = ["squeue", "--noheader", "--format=%i %P %T %r"]
        queue = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.strip()
        for line in queue.splitlines():
            if line.endswith("BeginTime"):
                subprocess.run(["scontrol", "update", f"JobId={line.split()[0]}", "StartTime=now"], check=False)
        if queue != shown:
            print(time.strftime("%H:%M:%S"), "|", queue.replace("\n", " | "), flush=True)
            shown = queue


if __name__ == "__main__":
    sys.exit(main())
