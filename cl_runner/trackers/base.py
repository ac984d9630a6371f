"""The interface of trackers: they are told about a run as it happens, and have no influence on it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """What is fixed before a run's first step."""

    folder: Path
    name: str  # for people, e.g. "ewc strength=100 · split_cifar100 · s0"
    group: str  # shared by runs that differ only in the seed
    id: str  # of this run: kept when it resumes
    config: dict[str, Any]  # resolved, plain values
    num_tasks: int
    scenario: str  # the run's own scenario
    resumed: bool
    command: str  # starts this run, and resumes it; empty for a run from Python


class Tracker(Protocol):
    """Is told about a run as it happens. Rows are plain JSON values; `seq` numbers them from the run's beginning.

    A step row: kind "step", seq, task, epoch, step (since the run began), task_step, task_steps, loss (name -> value,
    "total" among them), lr, timing. A task row: kind "task", seq, task, num_tasks, step, accuracy (scenario -> [T],
    null for what was not measured), metrics (name -> value or null, of the tasks so far), timing. An evaluation row,
    within a task with trainer.eval_every: kind "eval", seq, task, step, task_step, accuracy, timing.
    """

    def start(self, run: RunInfo) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def evaluation(self, row: dict[str, Any]) -> None: ...

    def task(self, row: dict[str, Any]) -> None: ...

    def finish(self, results: dict[str, Any]) -> None:
        """The run succeeded; `results` is the content of results.json."""
        ...

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        """Always called last, also after an exception, also when `start` was never reached.

        preempted: the run was told to stop, has saved what it needs, and will be started again; little time is left.
        """
        ...

    def line(self) -> str:
        """A line for the terminal when the run is over; empty for none."""
        ...


def tell(tracker: Tracker, row: dict[str, Any]) -> None:
    """Pass a row of the journal on, by its kind."""
    {"step": tracker.step, "eval": tracker.evaluation, "task": tracker.task}[row["kind"]](row)


class NullTracker:
    """Ignores everything. Trackers derive from it and override the methods that they need."""

    def start(self, run: RunInfo) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def evaluation(self, row: dict[str, Any]) -> None: ...

    def task(self, row: dict[str, Any]) -> None: ...

    def finish(self, results: dict[str, Any]) -> None: ...

    def close(self, failed: bool = False, preempted: bool = False) -> None: ...

    def line(self) -> str:
        return ""


class Many(NullTracker):
    """Several trackers, told one after the other."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def start(self, run: RunInfo) -> None:
        for tracker in self.trackers:
            tracker.start(run)

    def step(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.step(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.evaluation(row)

    def task(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.task(row)

    def finish(self, results: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.finish(results)

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        with ExitStack() as stack:  # one that raises must not keep the others from closing
            for tracker in reversed(self.trackers):
                stack.callback(tracker.close, failed, preempted)
