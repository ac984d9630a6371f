"""One experiment: every task in turn, measured, recorded, saved."""

import logging
import math
import os
import platform
import random
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from cl_runner import checkpoint, metrics
from cl_runner.config import Experiment
from cl_runner.evaluate import Drift, accuracies, measured_scenarios
from cl_runner.folder import RunFolder, write_atomically
from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Scenario, Stream, Task
from cl_runner.trackers.base import Many, RunInfo, Tracker
from cl_runner.trackers.local import Local
from cl_runner.trainer import Position, Trainer, Work

log = logging.getLogger("cl_runner")

SCHEMA = 1  # of results.json
Rows = dict[Scenario, list[list[float]]]  # scenario -> a row for every task learned


def run(experiment: Experiment, folder: RunFolder, watchers: Sequence[Tracker] = ()) -> dict[str, Any]:
    """Learn the whole stream, from the beginning or from where an earlier process was stopped.

    `watchers` are told what the folder's own files are told. Returns the content of results.json.
    """
    journal = Local()
    tracker = Many([journal, *watchers])
    failed = True
    try:
        results = _run(experiment, folder, journal, tracker)
        failed = False
    finally:
        tracker.close(failed)
    return results


def _run(experiment: Experiment, folder: RunFolder, journal: Local, tracker: Tracker) -> dict[str, Any]:
    clock = Clock(experiment.device)
    with clock("prepare"):
        _set_precision(experiment.trainer)
        _seed(experiment.trainer.seed)
        stream: Stream = experiment.stream.load(experiment.config["data_root"], experiment.device)
        model: Model = experiment.model.build(stream, experiment.trainer.active_logits).to(experiment.device)
        strategy: Strategy = experiment.strategy
        strategy.setup(model, stream)
        if experiment.trainer.compile:
            model.backbone.compile()
        state = State(experiment, folder, stream, model, clock, journal)
        state.restore()
    _start(tracker, experiment, folder, stream, resumed=state.position.tasks > 0)

    def record(row: dict[str, Any]) -> None:
        row = {"kind": row["kind"], "seq": state.position.rows, **row}
        state.position.rows += 1
        tracker.task(row) if row["kind"] == "task" else tracker.step(row)

    experiment.trainer.start(
        Work(model, strategy, experiment.make_optimizer, experiment.make_scheduler, record, state.position),
        state.optimizer_state,
    )
    for task in stream.tasks[state.position.tasks :]:
        _seed(experiment.trainer.seed, task.index)
        model.reveal(task)
        state.position.tasks = task.index + 1
        if strategy.offline and task.index < len(stream) - 1:
            continue
        if not state.zero_shot:
            with clock("evaluate"):
                state.zero_shot = state.evaluate(learned=0)
        with clock("consolidate"):
            strategy.before_task(task)
            data = strategy.training_data(task)
        with clock("train"):
            if len(data):
                experiment.trainer.learn(task, data)
        with clock("consolidate"):
            strategy.after_task(task)
        with clock("evaluate"):
            state.measure(task)
        record({"kind": "task", "task": task.index, "num_tasks": len(stream), **state.summary()})
        state.save(strategy)
    results = _results(experiment, state)
    state.save_weights()
    tracker.finish(results)
    state.done()
    return results


class State:
    """All that a run has gathered: its matrices, its position, what a checkpoint holds."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        stream: Stream,
        model: Model,
        clock: "Clock",
        journal: Local,
    ) -> None:
        self.experiment, self.folder, self.stream, self.model = experiment, folder, stream, model
        self.clock, self.journal = clock, journal
        self.strategy, self.trainer = experiment.strategy, experiment.trainer
        self.position = Position()
        self.rows: Rows = {scenario: [] for scenario in measured_scenarios(stream)}
        samples = self.trainer.drift_samples if model.pretrained_head is not None else 0
        self.drift = Drift(model, stream, samples, self.trainer.eval_batch_size) if samples else None
        self.moved: dict[str, float] = {}
        self.zero_shot: dict[Scenario, list[float]] = {}
        self.optimizer_state: dict[str, Any] | None = None

    def measure(self, task: Task) -> None:
        """One more row of every matrix."""
        for scenario, row in self.evaluate(learned=task.index + 1).items():
            missing = [[math.nan] * len(self.stream)] * (task.index - len(self.rows[scenario]))
            self.rows[scenario] += [*missing, row]
        self.moved = self.drift.measure() if self.drift else {}

    def matrices(self) -> dict[str, torch.Tensor]:
        """scenario -> [T, T], NaN where nothing was measured (yet)."""
        size = len(self.stream)
        unknown = [math.nan] * size
        return {
            str(scenario): torch.tensor([*rows, *[unknown] * (size - len(rows))], dtype=torch.float64)
            for scenario, rows in self.rows.items()
        }

    def metrics(self) -> dict[str, float | None]:
        zero_shot = {str(name): torch.tensor(row, dtype=torch.float64) for name, row in self.zero_shot.items()}
        return {
            **metrics.summarise(self.matrices(), zero_shot, str(self.stream.scenario), self.position.tasks),
            **self.moved,
        }

    def summary(self) -> dict[str, Any]:
        """What a task's journal row says."""
        return {
            "accuracy": {str(scenario): _plain(rows[-1]) for scenario, rows in self.rows.items()},
            "metrics": self.metrics(),
            "timing": {"seconds": dict(self.clock.seconds)},
        }

    def save(self, strategy: Strategy) -> None:
        state = {
            "config_hash": self.experiment.hash,
            "position": vars(self.position),
            "model": self.model.state_dict(),
            "strategy": checkpoint.strategy_state(strategy),
            "optimizer": self.trainer.optimizer_to_keep(),
            "rows": {str(scenario): rows for scenario, rows in self.rows.items()},
            "moved": self.moved,
            "zero_shot": {str(scenario): row for scenario, row in self.zero_shot.items()},
            "journal": self.journal.offset,
            "seconds": self.clock.seconds,
            "peak_memory": self.clock.peak_memory,
        }
        checkpoint.save(self.folder.path, state)
        self.folder.update_status(heartbeat=time.time(), tasks=self.position.tasks)

    def restore(self) -> None:
        state = checkpoint.load(self.folder.path, self.experiment.hash, self.experiment.device)
        if state is None:
            return
        self.position = Position(**state["position"])
        self.model.load_state_dict(state["model"])
        checkpoint.restore_strategy(self.strategy, state["strategy"])
        self.rows = {Scenario(name): rows for name, rows in state["rows"].items()}
        self.moved = state["moved"]
        self.zero_shot = {Scenario(name): row for name, row in state["zero_shot"].items()}
        self.journal.rewind(state["journal"])
        self.clock.add(state["seconds"], state["peak_memory"])
        self.optimizer_state = state["optimizer"]
        log.info("going on after task %d of %d", self.position.tasks, len(self.stream))

    def save_weights(self) -> None:
        """The final weights under plain names, usable as `model.pretrained=PATH`."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.plain_state().items()}
        content = safetensors_bytes(weights, metadata=self.model.weights_metadata())
        write_atomically(self.folder.path / "model.safetensors", content)

    def done(self) -> None:
        """Everything is on disk: say so, and drop what only an unfinished run needs."""
        self.folder.update_status(state="done", finished=time.time())
        if not self.trainer.keep_checkpoint:
            shutil.rmtree(self.folder.path / "checkpoint", ignore_errors=True)

    def evaluate(self, learned: int, split: str = "test") -> dict[Scenario, list[float]]:
        return accuracies(self.strategy, learned, self.trainer.eval_batch_size, split)


class Clock:
    """Seconds and peak memory by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.add({phase: time.perf_counter() - start}, {phase: self._peak()})

    def add(self, seconds: dict[str, float], peak_memory: dict[str, int]) -> None:
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        for phase, value in peak_memory.items():
            self.peak_memory[phase] = max(self.peak_memory.get(phase, 0), value)

    def _peak(self) -> int:
        """Bytes: on CUDA what tensors took at most in the phase, elsewhere what the process took so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on every platform

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were made with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "cl_runner": version("cl_runner"),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def _results(experiment: Experiment, state: State) -> dict[str, Any]:
    validation = [
        value
        for value in state.evaluate(len(state.stream), "validation")[state.stream.scenario]
        if not math.isnan(value)
    ]
    return {
        "schema": SCHEMA,
        "config": experiment.config,
        "environment": environment(experiment.device),
        "metrics": {
            **state.metrics(),
            "validation_accuracy": sum(validation) / len(validation) if validation else None,
        },
        "accuracy": {name: metrics.to_rows(matrix) for name, matrix in state.matrices().items()},
        "zero_shot": {str(name): _plain(row) for name, row in state.zero_shot.items()},
        "seconds": {**state.clock.seconds, "total": sum(state.clock.seconds.values())},
        "peak_memory": state.clock.peak_memory,
    }


def _start(tracker: Tracker, experiment: Experiment, folder: RunFolder, stream: Stream, resumed: bool) -> None:
    run_id = folder.status.get("id") or f"{experiment.hash}-{secrets.token_hex(3)}"
    folder.update_status(id=run_id)
    tracker.start(
        RunInfo(
            folder=folder.path,
            name=folder.path.name,
            group=f"{folder.path.name.rpartition('-s')[0]}-{experiment.group}",
            id=run_id,
            config=experiment.config,
            num_tasks=len(stream),
            scenario=str(stream.scenario),
            resumed=resumed,
            command=" ".join(sys.argv),
        )
    )


def _set_precision(trainer: Trainer) -> None:
    torch.set_float32_matmul_precision("high" if trainer.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = trainer.precision == "tf32"
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.backends.cudnn.benchmark = not trainer.deterministic
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _seed(seed: int, task: int = 0) -> None:
    """The same numbers in a task whether the process was there for the tasks before it or not."""
    torch.manual_seed(seed * 1_000_003 + task)
    np.random.seed((seed * 1_000_003 + task) % 2**32)
    random.seed(seed * 1_000_003 + task)


def _plain(row: list[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in row]
