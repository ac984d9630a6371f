"""One data set, split by classes."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.ranges import Count, Seed
from cl_runner.streams.base import Scenario
from cl_runner.streams.recipe import Recipe


@dataclass(kw_only=True)
class Split(Recipe):
    """Each task has classes of its own.

    class_order: natural, a permutation of the K classes, or an integer n for numpy's RandomState(n).permutation(K).
    first_task_classes: number of the first task's classes; the others share the rest equally. None: all have the same.

    A class's label is its position in the class order; in the domain scenario, its position within the task.
    """

    scenario: Scenario = Scenario.TASK
    class_order: Literal["natural"] | Seed | list[int] = "natural"
    first_task_classes: Count | None = None

    def check_classes(self, num_classes: int) -> None:
        if self.first_task_classes is not None and self.scenario == Scenario.DOMAIN:
            expected = "expected null in the domain scenario, where tasks share their labels"
            raise ConfigError("stream.first_task_classes", f"{expected}, got {self.first_task_classes}")
        if self.first_task_classes is not None and self.first_task_classes >= num_classes:
            expected = f"expected less than the {num_classes} classes"
            raise ConfigError("stream.first_task_classes", f"{expected}, got {self.first_task_classes}")
        first = self.first_task_classes or 0
        possible = [divisor + (first > 0) for divisor in divisors(num_classes - first)]
        if self.num_tasks not in possible:
            of = f"{num_classes} classes" + (f", {first} of them in the first task" if first else "")
            choices = ", ".join(map(str, possible))
            raise ConfigError("stream.num_tasks", f"expected one of {choices} for {of}; got {self.num_tasks}")
        if isinstance(self.class_order, list) and sorted(self.class_order) != list(range(num_classes)):
            expected = f"expected each of 0 to {num_classes - 1} once"
            raise ConfigError("stream.class_order", f"{expected}, got {self.class_order}")

    def label_space(self, num_classes: int) -> int:
        return num_classes // self.num_tasks if self.scenario == Scenario.DOMAIN else num_classes

    def labels(self, index: int, num_classes: int) -> Tensor:
        ends = list(accumulate(self.sizes(num_classes)))
        start, end = ends[index] - self.sizes(num_classes)[index], ends[index]
        first = 0 if self.scenario == Scenario.DOMAIN else start
        labels = torch.full((num_classes,), -1)
        labels[self.order(num_classes)[start:end]] = torch.arange(first, first + end - start)
        return labels

    def sizes(self, num_classes: int) -> list[int]:
        """Number of classes of each task."""
        if self.first_task_classes is None:
            return [num_classes // self.num_tasks] * self.num_tasks
        others = self.num_tasks - 1
        return [self.first_task_classes] + [(num_classes - self.first_task_classes) // others] * others

    def order(self, num_classes: int) -> Tensor:
        """[num_classes] int64: the classes in the stream's order."""
        if self.class_order == "natural":
            return torch.arange(num_classes)
        if isinstance(self.class_order, list):
            return torch.tensor(self.class_order)
        return torch.from_numpy(np.random.RandomState(int(self.class_order)).permutation(num_classes))


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
