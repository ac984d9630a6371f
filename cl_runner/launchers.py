"""Run jobs in processes of their own: on this machine, on SLURM, on a Ray cluster."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from getpass import getuser
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from cl_runner.errors import in_a_line
from cl_runner.folder import RunFolder
from cl_runner.sweep import LOGS

POLL = 0.2  # seconds between two checks of the running jobs
PATIENCE = 60.0  # seconds that jobs get to save themselves when a sweep is stopped
FOREVER = 60 * 24 * 3650  # minutes; submitit requires a limit


@dataclass
class Worker:
    """One job, carried out in another process. A call returns what went wrong, in one line, or None.

    argv: the command line of this job alone. folder: its run's folder as of submission. differs: the words that tell it
    from the sweep's other jobs, for people. environment: variables set before anything heavy is imported.
    log: a file to print to, instead of the process's stdout. sigterm_stops: whether SIGTERM ends the run once it is
    saved; on SLURM it only announces what is to come.
    """

    argv: list[str]
    folder: Path
    differs: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    log: Path | None = None
    sigterm_stops: bool = True
    cwd: Path = field(default_factory=Path.cwd)

    def __call__(self) -> str | None:
        os.chdir(self.cwd)
        os.environ.update(self.environment)
        if self.sigterm_stops:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.argv = ["cl-runner", *self.argv]
        from cl_runner.command import run_submitted

        try:
            with _printing_to(self.log):
                run_submitted(self.argv, self.folder)
        except KeyboardInterrupt as stopped:  # the run is saved, and whoever stopped it knows
            print(f"cl-runner: {str(stopped) or 'stopped before the run began'}", flush=True)
            raise SystemExit(130) from None
        except Exception as error:
            return in_a_line(error)
        return None

    def checkpoint(self) -> Any:
        """What submitit calls when the job was preempted: submit the same again, since a run resumes where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Pool(Protocol):
    """Where workers run. `submit` returns a job, which the other methods take.

    outlives: whether the jobs go on when this process ends.
    """

    outlives: bool

    def submit(self, worker: Worker, slot: int) -> Any: ...

    def over(self, job: Any) -> bool: ...

    def result(self, job: Any) -> str | None:
        """What the worker returned; also None if its process died."""
        ...

    def stop(self, job: Any) -> None:
        """Tell the job to save itself and end."""
        ...


def carry_out(workers: Sequence[Worker], pool: Pool, at_once: int) -> list[str | None]:
    """Run all workers, at most `at_once` at a time. One that fails or dies does not stop the others.

    Returns what each of them returned. KeyboardInterrupt stops those that are running, and is raised again when they
    have ended. Unless the jobs outlive this process, SIGTERM and a closed terminal (SIGHUP) do the same.
    """
    waiting, free = deque(enumerate(workers)), deque(range(at_once))
    running: dict[int, tuple[int, Any]] = {}  # slot -> number of the worker, its job
    results: list[str | None] = [None] * len(workers)
    try:
        with nullcontext() if pool.outlives else _handling(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):
            while waiting or running:
                while waiting and free:
                    number, worker = waiting.popleft()
                    slot = free.popleft()
                    running[slot] = number, pool.submit(worker, slot)
                    _tell(number, workers, "submitted")
                time.sleep(POLL)
                for slot, (number, job) in list(running.items()):
                    if pool.over(job):
                        results[number] = pool.result(job)
                        del running[slot]
                        free.append(slot)
                        _tell(number, workers, _state(workers[number], results[number]))
    except KeyboardInterrupt:
        _stop([job for _, job in running.values()], pool)
        raise
    return results


@contextmanager
def _handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals with `handler` in the body; ignored ones stay ignored (`nohup`)."""
    before = {number: signal.getsignal(number) for number in numbers}
    heard = {number: found for number, found in before.items() if found is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in heard.items():
            signal.signal(number, found)


def _stop(jobs: list[Any], pool: Pool) -> None:
    print(f"stopping {len(jobs)} job{'s' * (len(jobs) != 1)}; what they have done so far is kept", flush=True)
    for job in jobs:
        pool.stop(job)
    deadline = time.monotonic() + PATIENCE
    while not all(pool.over(job) for job in jobs) and time.monotonic() < deadline:
        time.sleep(POLL)


def _state(worker: Worker, result: str | None) -> str:
    """The state of a worker's job, once it has ended."""
    if result is not None:
        return "failed"
    return RunFolder(worker.folder).state if worker.folder.exists() else "killed"


def _tell(number: int, workers: Sequence[Worker], what: str) -> None:
    place = f"{number + 1:>{len(str(len(workers)))}}/{len(workers)}"
    print(f"{place} {what:<9} {workers[number].folder.name}  {workers[number].differs}".rstrip(), flush=True)


@contextmanager
def _printing_to(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _pickled(path: Path) -> str | None:
    """What a submitit worker returned; None if it never got that far."""
    if not path.exists():
        return None
    _, result = pickle.loads(path.read_bytes())
    return None if result is None else str(result).strip().rpartition("\n")[2]


def slots(gpus: Sequence[str], cores: int, at_once: int, per_gpu: int, threads: int | None) -> list[dict[str, str]]:
    """The environment of each job that runs at the same time on this machine: GPUs in turn, cores shared equally.

    gpus: by the names that CUDA_VISIBLE_DEVICES takes. at_once: how many jobs, but no more than the GPUs take.
    """
    many = min(at_once, len(gpus) * per_gpu) if gpus else at_once
    # submitit hides every GPU from a job that did not ask it for one.
    visible = gpus or [os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    return [
        {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)], "OMP_NUM_THREADS": str(threads or max(1, cores // many))}
        for slot in range(many)
    ]


class Local:
    """Processes on this machine, by submitit's local executor.

    environments: for each slot, the environment variables that its workers get in addition to this process's.
    """

    outlives = False

    def __init__(self, environments: Sequence[dict[str, str]], timeout_min: int | None, signal_delay_s: int) -> None:
        self._environments = environments
        self._limits = {"timeout_min": timeout_min or FOREVER, "signal_delay_s": signal_delay_s}

    def submit(self, worker: Worker, slot: int) -> Any:
        from submitit import LocalExecutor

        worker.environment = self._environments[slot]
        executor = LocalExecutor(_logs(worker), max_num_timeout=1000)
        executor.update_parameters(**self._limits, stderr_to_stdout=True)
        # A terminal's signals reach all of its processes. We handle them here and stop the workers one by one, since
        # submitit would kill a worker a second after Ctrl-C, saved or not.
        with _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP):
            return executor.submit(worker)

    def over(self, job: Any) -> bool:
        return job.done()

    def result(self, job: Any) -> str | None:
        return _pickled(job.paths.result_pickle)

    def stop(self, job: Any) -> None:
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller, which passes it on


class Slurm:
    """Jobs of a SLURM cluster, submitted by submitit.

    The queue tells which jobs have ended: accounting may be off, and a killed job leaves no word. A job that is already
    in the queue, from an earlier start of the sweep, is waited for.
    """

    outlives = True

    def __init__(self, max_num_timeout: int, poll_s: float, parameters: dict[str, Any]) -> None:
        self._max_num_timeout, self._poll_s, self._parameters = max_num_timeout, poll_s, parameters
        self._queue: dict[str, tuple[str, str]] = {}  # id -> (name, comment)
        self._looked = -float("inf")

    def submit(self, worker: Worker, slot: int) -> Any:
        from submitit import SlurmExecutor, SlurmJob

        worker.sigterm_stops = False
        worker.environment = {"OMP_NUM_THREADS": str(self._parameters.get("cpus_per_task", 1))}
        name, root = worker.folder.name, str(worker.folder.parent.resolve())
        self._look()
        for job_id, queued in self._queue.items():
            if queued == (name, root):
                return SlurmJob(_logs(worker), job_id)
        executor = SlurmExecutor(_logs(worker), max_num_timeout=self._max_num_timeout)
        executor.update_parameters(**self._parameters, job_name=name, comment=root, stderr_to_stdout=True)
        job = executor.submit(worker)
        self._queue[job.job_id] = name, root
        self._looked = time.monotonic()
        return job

    def over(self, job: Any) -> bool:
        self._look()
        return job.job_id not in self._queue

    def result(self, job: Any) -> str | None:
        return _pickled(job.paths.result_pickle)

    def stop(self, job: Any) -> None:
        for how in ("--state=PENDING", "--signal=INT"):  # on the latter, a run saves itself and ends
            subprocess.run(["scancel", how, job.job_id], capture_output=True, check=False)

    def _look(self) -> None:
        if time.monotonic() - self._looked < self._poll_s:
            return
        command = ["squeue", "--noheader", f"--user={getuser()}", "--format=%i|%j|%k"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self._looked = time.monotonic()
        if done.returncode == 0:  # a controller that does not answer now may answer next time
            rows = [line.split("|", 2) for line in done.stdout.splitlines()]
            self._queue = {job_id: (name, comment) for job_id, name, comment in rows}


class Ray:
    """Tasks on a Ray cluster, or on one started on this machine for the duration of the sweep."""

    outlives = False  # Ray ends the tasks of a process that has ended

    def __init__(self, address: str | None, cpus: float, gpus: float, retries: int) -> None:
        self._ray = ray = import_module("ray")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
        # One process per job, so that no run inherits what another has left in its process.
        options = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries, max_calls=1)
        self._task = options(lambda worker: worker())

    def submit(self, worker: Worker, slot: int) -> Any:
        worker.log = _logs(worker) / "log.out"
        worker.environment = {key: value for key, value in os.environ.items() if key.startswith(("CL_RUNNER", "WANDB"))}
        return self._task.remote(worker)

    def over(self, job: Any) -> bool:
        return bool(self._ray.wait([job], timeout=0)[0])

    def result(self, job: Any) -> str | None:
        try:
            return self._ray.get(job)
        except self._ray.exceptions.WorkerCrashedError:
            return None
        except self._ray.exceptions.RayError as error:
            return in_a_line(error)

    def stop(self, job: Any) -> None:
        self._ray.cancel(job)


def _logs(worker: Worker) -> Path:
    return worker.folder.parent / LOGS / worker.folder.name
