"""One experiment: learn every task in turn, measure, record and save."""

import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cl_runner.clock import Clock
from cl_runner.config import Experiment
from cl_runner.folder import RunFolder
from cl_runner.interrupt import Interrupt
from cl_runner.models.model import Model
from cl_runner.progress import Position
from cl_runner.pulse import pulse
from cl_runner.randomness import seed_all, task_seed
from cl_runner.state import State
from cl_runner.streams.base import Stream, Task
from cl_runner.trackers.base import Many, RunInfo, Tracker, tell
from cl_runner.trackers.journal import Journal
from cl_runner.trackers.names import command_of, overrides_of, run_name
from cl_runner.trainer import Trainer, Training

BEAT = 10.0  # maximum seconds between two signs of life

Record = Callable[[dict[str, Any]], None]


def run(
    experiment: Experiment, folder: RunFolder, watchers: Sequence[Tracker] = (), interrupt: Interrupt | None = None
) -> dict[str, Any]:
    """Learn the whole stream, from the beginning or from where an earlier process stopped.

    `watchers` are told everything that goes into the folder's own files; `interrupt` is told of signals. Returns the
    content of results.json. Raises Stopped if a signal asked for it.
    """
    journal, interrupt = Journal(), interrupt or Interrupt()
    tracker = Many([journal, *watchers])
    try:
        results = _run(experiment, folder, journal, tracker, interrupt)
    except BaseException as error:
        _end(folder, tracker, interrupt, error)
        raise
    tracker.close()
    return results


def _end(folder: RunFolder, tracker: Tracker, interrupt: Interrupt, error: BaseException) -> None:
    """Note in the folder what ended the run, and then say so: whoever reads that it is saved may kill the process."""
    stopped_by = interrupt.stopping
    try:
        with interrupt.deferred():
            if stopped_by is not None:
                folder.stop(stopped_by)
            else:
                folder.fail(error, traceback.format_exc())
    finally:
        tracker.close(failed=stopped_by is None, preempted=stopped_by is not None)


def _run(
    experiment: Experiment, folder: RunFolder, journal: Journal, tracker: Tracker, interrupt: Interrupt
) -> dict[str, Any]:
    clock, trainer, position = Clock(experiment.device), experiment.trainer, Position()

    def record(row: dict[str, Any]) -> None:
        row = {"kind": row["kind"], "seq": position.rows, **row}
        position.rows += 1
        tell(tracker, row)

    with clock("prepare"), pulse(folder.beat, BEAT):
        _set_precision(trainer)
        stream, model = assembled(experiment)
        if trainer.compile:
            model.backbone.compile()
        training = Training(
            trainer, model, experiment.strategy, experiment.make_optimizer, experiment.make_scheduler, record, position
        )
        state = State(experiment, folder, stream, training, clock, journal, interrupt)
        resumed = state.restore()
    _start(tracker, experiment, folder, stream, resumed)
    with pulse(state.beat, min(BEAT, trainer.checkpoint_seconds or BEAT)):
        state.prepared()
        while position.tasks < len(stream):
            _learn(stream.tasks[position.tasks], state, record)
        results = state.results()
        state.save_weights()
        tracker.finish(results)
    state.done()
    return results


def assembled(experiment: Experiment) -> tuple[Stream, Model]:
    """The stream and the model, which the strategy has set up."""
    seed_all(task_seed(experiment.trainer.seed, 0))
    stream = experiment.stream.load(experiment.config["data_root"], experiment.device)
    model = experiment.model.build(stream, experiment.active_logits).to(experiment.device)
    experiment.strategy.setup(model, stream)
    return stream, model


def _learn(task: Task, state: State, record: Record) -> None:
    """Learn one task, continuing from the run's current phase."""
    strategy, clock, position = state.strategy, state.clock, state.position
    if position.phase == "begin":
        seed_all(task_seed(state.trainer.seed, task.index))  # the same in a resumed process
        state.model.reveal(task)
        if strategy.offline and task.index < len(state.stream) - 1:
            position.tasks += 1
            return
        if not state.zero_shot:
            with clock("evaluate"):
                state.zero_shot = state.evaluate(learned=0)
        with clock("consolidate"):
            strategy.before_task(task)
        state.enter("learn")
    if position.phase == "learn":
        with clock("consolidate"):
            data = strategy.training_data(task)
        if len(data):
            with clock("train"), state.interrupt.deferred():
                state.training.learn(task, data, pause=state.save, look=partial(_look, task, state, record))
        state.enter("consolidate")
    with clock("consolidate"):
        strategy.after_task(task)
    with clock("evaluate"):
        state.measure(task)
    place = {"task": task.index, "num_tasks": len(state.stream), "step": position.steps}
    record({"kind": "task", **place, **state.summary()})
    state.enter("begin")


def _look(task: Task, state: State, record: Record, task_step: int) -> None:
    """Evaluate and record between two steps of a task."""
    place = {"task": task.index, "step": state.position.steps, "task_step": task_step}
    record({"kind": "eval", **place, "accuracy": state.look(task), "timing": {"time": time.time()}})


def _start(tracker: Tracker, experiment: Experiment, folder: RunFolder, stream: Stream, resumed: bool) -> None:
    run_id = folder.status.get("id") or f"{experiment.hash}-{secrets.token_hex(3)}"
    folder.update_status(id=run_id)
    tracker.start(
        RunInfo(
            folder=folder.path,
            name=run_name(experiment.config, overrides_of(folder.path)),
            group=f"{folder.path.name.rpartition('-s')[0]}-{experiment.group}",
            id=run_id,
            config=experiment.config,
            num_tasks=len(stream),
            scenario=str(stream.scenario),
            resumed=resumed,
            command=command_of(folder.path, folder.status.get("command", "")),
        )
    )


def _set_precision(trainer: Trainer) -> None:
    torch.set_float32_matmul_precision("high" if trainer.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = trainer.precision == "tf32"
    torch.use_deterministic_algorithms(trainer.deterministic)
    torch.backends.cudnn.benchmark = not trainer.deterministic
