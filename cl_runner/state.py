"""All that a run has gathered: its matrices, its position, what a checkpoint holds."""

import logging
import math
import shutil
import time
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from cl_runner import checkpoint, metrics
from cl_runner.clock import Clock, environment
from cl_runner.config import Experiment
from cl_runner.evaluate import Drift, accuracies, measured_scenarios
from cl_runner.folder import RunFolder, write_atomically
from cl_runner.models.model import Model
from cl_runner.streams.base import Scenario, Stream, Task
from cl_runner.trackers.local import Local
from cl_runner.trainer import Position

log = logging.getLogger("cl_runner")

SCHEMA = 1  # of results.json
SECONDS = "_seconds"  # how the names of reported seconds end
Rows = dict[Scenario, list[list[float]]]  # scenario -> a row for every task learned


class State:
    """All that a run has gathered: its matrices, its position, what a checkpoint holds."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        stream: Stream,
        model: Model,
        clock: Clock,
        journal: Local,
    ) -> None:
        self.experiment, self.folder, self.stream, self.model = experiment, folder, stream, model
        self.clock, self.journal = clock, journal
        self.strategy, self.trainer = experiment.strategy, experiment.trainer
        self.position = Position()
        self.rows: Rows = {scenario: [] for scenario in measured_scenarios(experiment.strategy)}
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
            **{name: value for name, value in self.strategy.report().items() if not name.endswith(SECONDS)},
        }

    def seconds(self) -> dict[str, float]:
        """By phase, and of what the strategy timed within them."""
        reported = {name: value for name, value in self.strategy.report().items() if name.endswith(SECONDS)}
        return {**self.clock.seconds, **{name.removesuffix(SECONDS): value or 0.0 for name, value in reported.items()}}

    def summary(self) -> dict[str, Any]:
        """What a task's journal row says."""
        return {
            "accuracy": {str(scenario): _plain(rows[-1]) for scenario, rows in self.rows.items()},
            "metrics": self.metrics(),
            "timing": {"seconds": self.seconds()},
        }

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        last = self.evaluate(len(self.stream), "validation")[self.stream.scenario]
        validation = [value for value in last if not math.isnan(value)]
        return {
            "schema": SCHEMA,
            "config": self.experiment.config,
            "environment": environment(self.experiment.device),
            "metrics": {
                **self.metrics(),
                "validation_accuracy": sum(validation) / len(validation) if validation else None,
            },
            "accuracy": {name: metrics.to_rows(matrix) for name, matrix in self.matrices().items()},
            "zero_shot": {str(name): _plain(row) for name, row in self.zero_shot.items()},
            "seconds": {**self.seconds(), "total": sum(self.clock.seconds.values())},
            "peak_memory": self.clock.peak_memory,
        }

    def save(self) -> None:
        """A checkpoint to go on from after the task just learned."""
        state = {
            "config_hash": self.experiment.hash,
            "position": vars(self.position),
            "model": self.model.state_dict(),
            "strategy": checkpoint.strategy_state(self.strategy),
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
        """Go on from the last checkpoint, if there is one."""
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


def _plain(row: list[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in row]
