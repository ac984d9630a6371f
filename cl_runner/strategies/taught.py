"""What methods share that have the model before the task as a teacher, and those that learn exemplars along with it."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from cl_runner.memory.base import Memory
from cl_runner.models.heads import per_row
from cl_runner.models.model import Model, Output
from cl_runner.models.prompts import Prompts
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.looking import features_of
from cl_runner.streams.base import Examples, Stream, Task

Module = TypeVar("Module", bound=nn.Module)


class Taught(Strategy):
    """Has the model as it was before the task, still, to answer for what was learned earlier."""

    saved = ("teacher", "old", "number", "prompted")

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.teacher = still(model)
        self.old: Tensor = torch.zeros_like(model.revealed)  # [K] bool: the classes of earlier tasks
        self.number = 1  # of the task, from 1

    def before_task(self, task: Task) -> None:
        self.teacher.load_state_dict(self.model.state_dict())
        self.prompted = any(prompts.on for prompts in _prompts_of(self.model))
        self.number = task.index + 1
        self.old = torch.zeros_like(self.old)
        self.old[[label for earlier in self.stream.tasks[: task.index] for label in earlier.classes]] = True

    @property
    def prompted(self) -> bool:
        """Whether the prompts that another part has given the teacher are on, which its state does not say."""
        return any(prompts.on for prompts in _prompts_of(self.teacher))

    @prompted.setter
    def prompted(self, value: bool) -> None:
        for prompts in _prompts_of(self.teacher):
            prompts.on = value

    @torch.no_grad()
    def taught(self, output: Output) -> Output:
        """What the teacher says of the same augmented images."""
        return self.teacher.encode(output.inputs)

    @torch.no_grad()
    def hold_old_rows(self) -> None:
        """Put the head's rows of earlier classes back to where they were before the task.

        For after a step, since momentum and decay move weights without a gradient too.
        """
        for name, live in self.model.head.named_parameters():
            if live.dim() and len(live) == len(self.old):
                old = per_row(self.old, live)
                live.copy_(torch.where(old, self.teacher.head.get_parameter(name), live))


class Exemplars(Taught):
    """Learns what the memory holds as part of each task's data, and offers it the task at its end."""

    saved = (*Taught.saved, "memory")

    def __init__(self, *, memory: Memory) -> None:
        self.memory = memory

    def training_data(self, task: Task) -> Examples:
        fresh = task.train
        return fresh + self.memory.examples.to(fresh.labels.device) if len(self.memory) else fresh

    def after_task(self, task: Task) -> None:
        self.memory.add_task(task.train, features_of(self.model))


def _prompts_of(model: Model) -> list[Prompts]:
    return [module for module in model.modules() if isinstance(module, Prompts)]


def still(model: Module) -> Module:
    """A copy that never changes: no gradients, in eval mode, out of reach of the model's own `train()`."""
    return deepcopy(model).requires_grad_(False).eval()
