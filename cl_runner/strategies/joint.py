"""Joint training: the upper bound of most tables."""

from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Task, concatenate


class Joint(Strategy):
    """Learn all tasks at once, when the last has arrived; a budget in iterations is multiplied by their number."""

    offline = True

    def training_data(self, task: Task) -> Examples:
        return concatenate([each.train for each in self.stream.tasks])
