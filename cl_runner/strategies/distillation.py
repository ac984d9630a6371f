"""Base classes of methods whose teacher is the model before the task, without and with exemplars."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from cl_runner.memory.base import Memory
from cl_runner.models.heads import per_row
from cl_runner.models.model import Model, Output
from cl_runner.models.prompts import Prompts
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import features_of
from cl_runner.streams.base import Examples, Stream, Task

Module = TypeVar("Module", bound=nn.Module)


class Distillation(Strategy):
    """Keeps a frozen copy of the model before the task, as a teacher of what was learned earlier."""

    saved = ("teacher", "old", "new", "number", "prompted")
    has_teacher = True

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.teacher = frozen_copy(model)
        self.old: Tensor = torch.zeros_like(model.revealed)  # [K] bool: the classes of earlier tasks
        self.new: Tensor = torch.empty(0, dtype=torch.int64, device=model.device)  # classes that no earlier task had
        self.number = 1  # of the task, from 1

    def before_task(self, task: Task) -> None:
        self.teacher.load_state_dict(self.model.state_dict())
        self.prompted = any(prompts.on for prompts in _prompts_of(self.model))
        self.number = task.index + 1
        earlier = self.stream.classes_before(task.index)
        self.old = torch.zeros_like(self.old)
        self.old[earlier] = True
        new = [label for label in task.classes if label not in earlier]
        self.new = torch.tensor(new, dtype=torch.int64, device=self.old.device)

    @property
    def prompted(self) -> bool:
        """Whether the teacher's prompts, if another part has given it any, are on: not part of its `state_dict`."""
        return any(prompts.on for prompts in _prompts_of(self.teacher))

    @prompted.setter
    def prompted(self, value: bool) -> None:
        for prompts in _prompts_of(self.teacher):
            prompts.on = value

    @torch.no_grad()
    def teacher_output(self, output: Output) -> Output:
        """The teacher's output for the same augmented images."""
        return self.teacher.encode(output.inputs)

    @torch.no_grad()
    def hold_old_rows(self) -> None:
        """Reset the head's rows of earlier classes to what they were before the task.

        To be called after a step, since momentum and weight decay move weights without a gradient too.
        """
        for name, live in self.model.head.named_parameters():
            if live.dim() and len(live) == len(self.old):
                old = per_row(self.old, live)
                live.copy_(torch.where(old, self.teacher.head.get_parameter(name), live))


class Exemplars(Distillation):
    """Trains on the memory's rows as part of each task's data, and offers it the task at its end."""

    saved = (*Distillation.saved, "memory")

    def __init__(self, *, memory: Memory) -> None:
        self.memory = memory

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.memory.warn_of_lack(stream, each_class=True)

    def training_data(self, task: Task) -> Examples:
        fresh = task.train
        return fresh + self.memory.examples.to(fresh.labels.device) if len(self.memory) else fresh

    def after_task(self, task: Task) -> None:
        self.memory.add_task(task.train, features_of(self.model))


def _prompts_of(model: Model) -> list[Prompts]:
    return [module for module in model.modules() if isinstance(module, Prompts)]


def frozen_copy(model: Module) -> Module:
    """A copy without gradients, in eval mode, which the model's own `train()` does not reach."""
    return deepcopy(model).requires_grad_(False).eval()


def precise(values: Tensor) -> Tensor:
    """The same in float32 at least: autocast leaves bf16 on CPUs, which loses small differences from a teacher."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
