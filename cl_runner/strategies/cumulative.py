"""Cumulative training: fine-tuning that never throws data away."""

from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Task, concatenate


class Cumulative(Strategy):
    """Train on each task together with the data of all earlier tasks."""

    keeps_all_data = True

    def training_data(self, task: Task) -> Examples:
        return concatenate([each.train for each in self.stream.tasks[: task.index + 1]])
