"""The parts of a task stream: examples, tasks, streams.

Shapes, here and everywhere: B batch, N examples, C channels, H x W pixels, D features, K classes, T tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from cl_runner.errors import ConfigError

Shape = tuple[int, int, int]  # C, H, W of an image


class Scenario(StrEnum):
    """What is known about the task at test time (van de Ven et al., 2022, https://arxiv.org/abs/1904.07734)."""

    TASK = "task"  # the task is given: choose among its classes
    DOMAIN = "domain"  # the task is unknown and irrelevant: all tasks share their classes
    CLASS = "class"  # the task is unknown: choose among all classes seen so far


@dataclass(frozen=True)
class Examples:
    """The rows of a data set, a batch or a memory: images, labels and the tasks they came from."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64, in the stream's label space
    task_ids: Tensor  # [N] int64
    extras: dict[str, Tensor] = field(default_factory=dict)  # [N, ...] each, e.g. stored logits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Examples":
        """Rows by slice, boolean mask [N] or integer index [n]; a slice copies nothing."""
        extras = {name: values[index] for name, values in self.extras.items()}
        return Examples(self.images[index], self.labels[index], self.task_ids[index], extras)

    def __add__(self, other: "Examples") -> "Examples":
        """These rows, then the other's; extras that only one side has are dropped."""
        return concatenate([self, other])

    def to(self, device: torch.device | str) -> "Examples":
        # Towards the CPU, a copy that is not waited for could be read before it is there.
        waits = torch.device(device).type == "cpu"

        def move(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=not waits)

        extras = {name: move(values) for name, values in self.extras.items()}
        return Examples(move(self.images), move(self.labels), move(self.task_ids), extras)

    def batches(self, size: int) -> Iterator["Examples"]:
        """All rows in order, `size` at a time; the last batch may be short."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def shuffled(
        self, size: int, generator: torch.Generator, drop_last: bool = False, first: int = 0
    ) -> Iterator["Examples"]:
        """All rows once, shuffled by `generator` (a CPU generator), `size` at a time, starting at batch number `first`.

        The last batch may be short; `drop_last` leaves it out unless it is the only one. A single row left over joins
        the batch before it: a batch of one has no statistics for a normalisation layer.
        """
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        count = number_of_batches(len(self), size, drop_last)
        for number in range(first, count):
            last = number == count - 1 and not drop_last
            yield self[order[number * size :] if last else order[number * size : (number + 1) * size]]

    def split(self, parts: int) -> Iterator["Examples"]:
        """Up to `parts` parts in order, of nearly equal size, none of a single row unless there is only one."""
        size = len(self)
        parts = max(1, min(parts, size // 2))
        edges = [size * part // parts for part in range(parts + 1)]
        for start, end in pairwise(edges):
            yield self[start:end]


def number_of_batches(rows: int, size: int, drop_last: bool = False) -> int:
    """How many batches `Examples.shuffled` makes."""
    whole, rest = divmod(rows, size)
    return max(1, whole) if drop_last or rest == 0 or (rest == 1 and whole) else whole + 1


def concatenate(parts: Sequence[Examples]) -> Examples:
    """All rows of all parts, in order, with the extras that every part has."""
    shared = set.intersection(*(set(part.extras) for part in parts))
    return Examples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.task_ids for part in parts]),
        {name: torch.cat([part.extras[name] for part in parts]) for name in sorted(shared)},
    )


class Task:
    """One step of the stream: its classes (labels in the stream's label space) and its three sets of examples.

    `train` and `validation` are built on access and not kept, so that a long stream takes the memory of one task;
    `test`, needed after every task, is kept. All raise ConfigError for a label that is not among the classes.
    """

    def __init__(self, index: int, classes: tuple[int, ...], build: Callable[[str], Examples]) -> None:
        """`build`: train, validation or test -> the examples."""
        self.index, self.classes, self._build = index, classes, build

    @property
    def train(self) -> Examples:
        return self._built("train")

    @property
    def validation(self) -> Examples:
        return self._built("validation")

    @cached_property
    def test(self) -> Examples:
        return self._built("test")

    def _built(self, split: str) -> Examples:
        examples = self._build(split)
        if foreign := sorted(set(examples.labels.unique().tolist()).difference(map(int, self.classes))):
            says = f"expected {split} labels of task {self.index} among its classes {list(self.classes)}, got {foreign}"
            raise ConfigError("stream", says)
        return examples


@dataclass(frozen=True)
class Stream:
    """The tasks in order, and what a model must know to learn them."""

    scenario: Scenario
    tasks: Sequence[Task]
    num_classes: int  # size of the label space, all tasks together
    image_shape: Shape  # as the tasks' images come
    mean: tuple[float, ...] | None  # per channel, of images in [0, 1]; None: leave them in [0, 1]
    std: tuple[float, ...] | None
    augment: tuple[str, ...] = ()  # of training images, by the model: "crop", "flip", "brightness"
    crop_padding: int = 4

    def __len__(self) -> int:
        return len(self.tasks)

    def classes_before(self, index: int) -> list[int]:
        """The classes of all tasks before task `index`, ascending."""
        return sorted({label for task in self.tasks[:index] for label in task.classes})
