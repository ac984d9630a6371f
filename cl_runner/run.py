"""One experiment: every task in turn, measured, recorded, saved."""

import os
import random
import secrets
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cl_runner.clock import Clock
from cl_runner.config import Experiment
from cl_runner.folder import RunFolder
from cl_runner.models.model import Model
from cl_runner.state import State
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Stream
from cl_runner.trackers.base import Many, RunInfo, Tracker
from cl_runner.trackers.local import Local
from cl_runner.trainer import Trainer, Work


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
        state.save()
    results = state.results()
    state.save_weights()
    tracker.finish(results)
    state.done()
    return results


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
