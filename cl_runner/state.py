"""The state of a run: its matrices, its position, and what a checkpoint holds."""

import logging
import math
import shutil
import time
from typing import Any

import numpy as np

from cl_runner import checkpoint, metrics
from cl_runner.clock import Clock
from cl_runner.config import Experiment
from cl_runner.environment import differences, environment
from cl_runner.evaluate import Drift, accuracies, measured_scenarios
from cl_runner.folder import RESULTS_SCHEMA, RunFolder
from cl_runner.interrupt import Interrupt
from cl_runner.models import weights
from cl_runner.randomness import random_state, restore_random_state
from cl_runner.strategies.inference import evaluating
from cl_runner.streams.base import Scenario, Stream, Task
from cl_runner.trackers.journal import Journal
from cl_runner.trainer import Training

log = logging.getLogger("cl_runner")

SECONDS = "_seconds"  # suffix of the names of reported timings
Rows = dict[Scenario, list[list[float]]]  # scenario -> one row per learned task


class State:
    """A run's matrices and position, saved in checkpoints and restored from them."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        stream: Stream,
        training: Training,
        clock: Clock,
        journal: Journal,
        interrupt: Interrupt,
    ) -> None:
        self.experiment, self.folder, self.stream, self.training = experiment, folder, stream, training
        self.clock, self.journal, self.interrupt = clock, journal, interrupt
        self.trainer, self.strategy, self.model = training.trainer, training.strategy, training.model
        self.position, self.pace = training.position, training.pace
        interrupt.soon = self.pace.now
        self.rows: Rows = {scenario: [] for scenario in measured_scenarios(self.strategy)}
        self.validation: Rows = {scenario: [] for scenario in self.rows}
        # Each task's lowest accuracy since it was learned, as far as it was measured; NaN until then.
        self.lowest = {scenario: [math.nan] * len(stream) for scenario in self.rows}
        self.looked = False  # it has been evaluated within a task
        samples = self.trainer.drift_samples if self.model.pretrained_head is not None else 0
        self.drift = Drift(self.model, stream, samples, self.trainer.eval_batch_size) if samples else None
        self.drift_metrics: dict[str, float] = {}
        self.zero_shot: dict[Scenario, list[float]] = {}
        self.environments = [environment(experiment.device)]  # that the run was made in; the last is this process's
        self.random: dict[str, Any] | None = None  # generators at the phase's start; None: it seeds them itself

    def measure(self, task: Task) -> None:
        """Add a row to every matrix once the task has been learned."""
        self.position.tasks = learned = task.index + 1
        self._add(self.rows, task, measured := self.evaluate(learned))
        self._lower(measured, task)
        new = self.stream.tasks[:learned] if self.strategy.offline else [task]
        if any(self.validation.values()) or any(len(each.validation) for each in new):
            self._add(self.validation, task, self.evaluate(learned, "validation"))
        self.drift_metrics = self.drift.measure() if self.drift else {}

    def look(self, task: Task) -> dict[str, list[float | None]]:
        """Evaluate on the tasks so far between two steps, which the training does not notice. Returns scenario ->
        accuracies."""
        random = random_state(self.experiment.device)
        with self.clock("evaluate"), evaluating(self.model):
            measured = self.evaluate(learned=task.index + 1, ahead=False)
        restore_random_state(random, self.experiment.device)
        self.looked = True
        self._lower(measured, task)
        return {str(scenario): _plain(row) for scenario, row in measured.items()}

    def _lower(self, measured: dict[Scenario, list[float]], task: Task) -> None:
        """Lower the lowest accuracies of the tasks learned before `task` to those measured now."""
        for scenario, row in measured.items():
            for index in range(0 if self.strategy.offline else task.index):
                self.lowest[scenario][index] = float(np.fmin(self.lowest[scenario][index], row[index]))

    def _add(self, matrices: Rows, task: Task, rows: dict[Scenario, list[float]]) -> None:
        for scenario, row in rows.items():
            missing = [[math.nan] * len(self.stream)] * (task.index - len(matrices[scenario]))
            matrices[scenario] += [*missing, row]

    def matrices(self, measured: Rows | None = None) -> dict[str, np.ndarray]:
        """scenario -> [T, T], NaN where nothing was measured (yet); of `measured`, by default the test splits."""
        size = len(self.stream)
        unknown = [math.nan] * size
        return {
            str(scenario): np.array([*rows, *[unknown] * (size - len(rows))])
            for scenario, rows in (measured or self.rows).items()
            if rows
        }

    def metrics(self) -> dict[str, float | None]:
        zero_shot = {str(name): np.array(row) for name, row in self.zero_shot.items()}
        lowest = {str(name): np.array(row) for name, row in self.lowest.items()} if self.looked else {}
        learned = self.position.tasks
        sizes = np.array([len(task.test) for task in self.stream.tasks[:learned]])
        return {
            **metrics.summarise(self.matrices(), zero_shot, str(self.stream.scenario), learned, sizes, lowest),
            **self.drift_metrics,
            **{name: value for name, value in self.strategy.report().items() if not name.endswith(SECONDS)},
        }

    def seconds(self) -> dict[str, float]:
        """Timings by phase, and those of the strategy within them."""
        reported = {name: value for name, value in self.strategy.report().items() if name.endswith(SECONDS)}
        return {**self.clock.seconds, **{name.removesuffix(SECONDS): value or 0.0 for name, value in reported.items()}}

    def summary(self) -> dict[str, Any]:
        """The content of a task's journal row."""
        return {
            "accuracy": {str(scenario): _plain(rows[-1]) for scenario, rows in self.rows.items()},
            "metrics": self.metrics(),
            "timing": {"seconds": self.seconds()},
        }

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema": RESULTS_SCHEMA,
            "config": self.experiment.config,
            "environment": self.environments[-1],
            "earlier_environments": self.environments[:-1],
            "metrics": {**self.metrics(), **self._validation_accuracy()},
            "accuracy": {name: metrics.to_rows(matrix) for name, matrix in self.matrices().items()},
            "validation": {name: metrics.to_rows(matrix) for name, matrix in self.matrices(self.validation).items()},
            "zero_shot": {str(name): _plain(row) for name, row in self.zero_shot.items()},
            "seconds": {**self.seconds(), "total": sum(self.clock.seconds.values())},
            "peak_memory": self.clock.peak_memory,
        }

    def prepared(self) -> None:
        """Called when all components exist: restore the random generators as at the start of the phase."""
        self.folder.beat(**self.progress)
        if self.random is not None:
            restore_random_state(self.random, self.experiment.device)

    def _validation_accuracy(self) -> dict[str, float | None]:
        """Mean over all tasks at the end, None without validation splits; the run's own scenario also unsuffixed."""
        means = {}
        for scenario, rows in self.validation.items():
            if last := [value for row in rows[-1:] for value in row if not math.isnan(value)]:
                means[f"validation_accuracy/{scenario}"] = sum(last) / len(last)
        return {"validation_accuracy": means.get(f"validation_accuracy/{self.stream.scenario}"), **means}

    def enter(self, phase: str) -> None:
        """Begin another phase, saving the run if that is worthwhile, and always at the end of a task.

        Raises what `save` raises.
        """
        self.position.phase = phase
        self.random = random_state(self.experiment.device)
        if phase == "begin" or self.pace.worth_it or self.interrupt.asked:
            self.save()

    def save(self) -> None:
        """Save a checkpoint to resume from: between two steps, or between two phases of a task.

        Raises CannotWriteError, and Stopped if the run has been told to stop.
        """
        with self.interrupt.deferred(), self.clock("checkpoint"):
            start = time.perf_counter()
            checkpoint.save(self.folder.path, self.experiment.hash, self.experiment.device, self.state_dict())
            self.pace.cost = time.perf_counter() - start
            self.pace.saved(self.position.steps)
            self.interrupt.place = f"goes on at {self.place}"
            self.folder.beat(**self.progress)
        self.interrupt.heed()

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": vars(self.position),
            "environments": self.environments,
            "random": self.random,
            "model": checkpoint.model_state(self.model),
            "strategy": self.strategy.state_dict(),
            "trainer": self.training.state_dict(),
            "rows": {str(scenario): rows for scenario, rows in self.rows.items()},
            "validation": {str(scenario): rows for scenario, rows in self.validation.items()},
            "lowest": {str(scenario): row for scenario, row in self.lowest.items()},
            "looked": self.looked,
            "drift_metrics": self.drift_metrics,
            "zero_shot": {str(scenario): row for scenario, row in self.zero_shot.items()},
            "journal": self.journal.offset,
            "seconds": self.clock.seconds,
            "peak_memory": self.clock.peak_memory,
        }

    def restore(self) -> bool:
        """Resume from the last checkpoint. Returns whether there is one."""
        state = checkpoint.load(self.folder.path, self.experiment.hash, self.experiment.device)
        if state is None:
            return False
        vars(self.position).update(state["position"])
        earlier, now = state.get("environments", []), self.environments[-1]
        self.environments = [*(each for each in earlier if each != now), now]
        self.random = state["random"]
        checkpoint.restore_model(self.model, state["model"])
        self.strategy.load_state_dict(state["strategy"])
        self.training.load_state_dict(state["trainer"])
        self.rows = {Scenario(name): rows for name, rows in state["rows"].items()}
        self.validation = {Scenario(name): rows for name, rows in state["validation"].items()}
        self.lowest |= {Scenario(name): row for name, row in state.get("lowest", {}).items()}
        self.looked = state.get("looked", False)
        self.drift_metrics = state["drift_metrics"]
        self.zero_shot = {Scenario(name): row for name, row in state["zero_shot"].items()}
        self.journal.rewind(state["journal"])
        self.clock.add(state["seconds"], state["peak_memory"])
        self.pace.saved(self.position.steps)
        self.interrupt.place = f"goes on at {self.place}"
        log.info("going on at %s", self.place)
        for what in differences(self.environments[:-1], now):
            log.warning("part of it was made with %s", what)
        return True

    @property
    def place(self) -> str:
        """Where the run is, for people; tasks are numbered as in the matrices."""
        learned = self.position.tasks == len(self.stream)
        return "the end" if learned else f"task {self.position.tasks}, step {self.position.steps}"

    def beat(self) -> None:
        """Report that the run is alive and where it is, and request a checkpoint if it is time."""
        self.pace.look_at_the_clock()
        self.folder.beat(**self.progress)

    @property
    def progress(self) -> dict[str, int]:
        position, size = self.position, len(self.stream)
        return {
            "task": min(position.tasks, size - 1),
            "tasks": position.tasks,
            "num_tasks": size,
            "step": position.steps,
        }

    def save_weights(self) -> None:
        """The final weights under plain names, usable as `model.pretrained=PATH`."""
        weights.write(self.folder.path / "model.safetensors", self.model.plain_state(), self.model.metadata)

    def done(self) -> None:
        """Mark the run as done, now that all is on disk, and remove what only an unfinished run needs."""
        with self.interrupt.deferred():
            self.folder.update_status(state="done", finished=time.time(), **self.progress)
            if not self.trainer.keep_checkpoint:
                shutil.rmtree(self.folder.path / checkpoint.FOLDER, ignore_errors=True)

    def evaluate(self, learned: int, split: str = "test", ahead: bool = True) -> dict[Scenario, list[float]]:
        return accuracies(self.strategy, learned, self.trainer.eval_batch_size, split, ahead)


def _plain(row: list[float]) -> list[float | None]:
    """The row for JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in row]
