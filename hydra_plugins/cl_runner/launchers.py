"""Hydra's launchers: their settings are in conf/hydra/launcher, their work is done in `cl_runner.launchers`.

Hydra imports this file whenever it starts, so nothing heavy is imported before it is needed.
"""

import os
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from cl_runner.errors import ConfigError, missing_extra
from cl_runner.ranges import Count


class Processes(Launcher):
    """Runs every job in a process of its own, which composes its configuration anew from the overrides.

    finds_running: whether to launch jobs that are already running, since the launcher then finds and awaits them.
    """

    finds_running = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from cl_runner.launchers import Worker, carry_out
        from cl_runner.sweep import of_this_command

        sweep = of_this_command(Path(self.config.output_root))
        jobs = {tuple(job.overrides): job for job in sweep.jobs}
        options, root, differing = self._options(), sweep.root.absolute(), sweep.differing()
        workers = [
            Worker([*options, *job.overrides], root / job.folder, differing[job.folder])
            for job in (jobs[tuple(words)] for words in job_overrides)
        ]
        pool, at_once = self.pool(len(workers))
        return [_returned(result) for result in carry_out(workers, pool, at_once)]

    @abstractmethod
    def pool(self, jobs: int) -> tuple[Any, int]:
        """Where the jobs run, and how many at a time."""

    def _options(self) -> list[str]:
        """A job's command line before its own overrides."""
        sources = {source.provider: source.path for source in self.config.hydra.runtime.config_sources}
        folder = ["--config-dir", sources["command-line"]] if "command-line" in sources else []
        mine = ("hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper", "hydra.mode")
        return [
            *folder,
            *(word for word in self.config.hydra.overrides.hydra if not word.lstrip("+~").startswith(mine)),
        ]


def _returned(result: str | None) -> JobReturn:
    if result is None:  # the run's folder tells its state
        return JobReturn(status=JobStatus.COMPLETED)
    return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(result))


class Local(Processes):
    """Processes on this machine (submitit), at most `at_once` at a time and `per_gpu` per GPU."""

    def __init__(
        self,
        at_once: Count | None = None,
        per_gpu: Count = 1,
        threads: Count | None = None,
        timeout_min: Count | None = None,
        signal_delay_s: Count = 30,
    ) -> None:
        _need("local", "submitit")
        self.at_once, self.per_gpu, self.threads = at_once, per_gpu, threads
        self.timeout_min, self.signal_delay_s = timeout_min, signal_delay_s

    def pool(self, jobs: int) -> tuple[Any, int]:
        from cl_runner import launchers

        gpus = [] if self.config.device == "cpu" else _gpus()
        at_once = min(jobs, self.at_once or len(gpus) * self.per_gpu or _cores())
        slots = launchers.slots(gpus, _cores(), at_once, self.per_gpu, self.threads)
        return launchers.Local(slots, self.timeout_min, self.signal_delay_s), len(slots)


class Slurm(Processes):
    """Jobs on a SLURM cluster (submitit), requeued when preempted or out of time."""

    finds_running = True

    def __init__(
        self,
        at_once: Count | None = None,
        timeout_min: Count = 240,
        signal_delay_s: Count = 120,
        max_num_timeout: NonNegativeInt = 100,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        cpus_per_task: Count = 4,
        gpus_per_node: NonNegativeInt = 1,
        mem_gb: PositiveFloat | None = 16.0,
        setup_commands: list[str] | None = None,
        additional_parameters: dict[str, Any] | None = None,
        poll_s: PositiveFloat = 10.0,
    ) -> None:
        _need("slurm", "submitit")
        if missing := [tool for tool in ("sbatch", "srun", "squeue", "scancel") if shutil.which(tool) is None]:
            raise ConfigError(
                "hydra/launcher", f"slurm expected {missing[0]} on the PATH: jobs are submitted from a cluster's node"
            )
        self.at_once, self.max_num_timeout, self.poll_s = at_once, max_num_timeout, poll_s
        given = {
            "time": timeout_min,
            "signal_delay_s": signal_delay_s,
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "cpus_per_task": cpus_per_task,
            "gpus_per_node": gpus_per_node or None,
            "mem": mem_gb and f"{round(mem_gb * 1024)}M",
            "setup": _plain(setup_commands),
            "additional_parameters": {"requeue": True, **(_plain(additional_parameters) or {})},
        }
        self.parameters = {key: value for key, value in given.items() if value is not None}

    def pool(self, jobs: int) -> tuple[Any, int]:
        from cl_runner import launchers

        return launchers.Slurm(self.max_num_timeout, self.poll_s, self.parameters), self.at_once or jobs


class Ray(Processes):
    """Tasks on a Ray cluster."""

    def __init__(
        self,
        address: str | None = None,
        cpus: PositiveFloat = 1.0,
        gpus: NonNegativeFloat = 0.0,
        retries: Annotated[int, Field(ge=-1)] = 3,
    ) -> None:
        _need("ray", "ray")
        self.address, self.cpus, self.gpus, self.retries = address, cpus, gpus, retries

    def pool(self, jobs: int) -> tuple[Any, int]:
        from cl_runner import launchers

        return launchers.Ray(self.address, self.cpus, self.gpus, self.retries), jobs


def _need(extra: str, package: str) -> None:
    if find_spec(package) is None:
        raise missing_extra("hydra/launcher", extra)


def _cores() -> int:
    """The cores that this process may use, or all where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs of this machine, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
