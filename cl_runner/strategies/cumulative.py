"""Cumulative training: fine-tuning that never throws data away."""

from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Task, concatenate


class Cumulative(Strategy):
    """Learn each task together with all the data of the tasks before it."""

    keeps_all_data = True

    def training_data(self, task: Task) -> Examples:
        return concatenate([each.train for each in self.stream.tasks[: task.index + 1]])
