"""Learning without forgetting (Li & Hoiem, 2017, arXiv 1606.09282), from the pretrained model too."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model, Output, PretrainedView
from cl_runner.strategies.anchors import Source, check_source, wants_pretrained, wants_previous
from cl_runner.strategies.taught import Taught, frozen_copy
from cl_runner.streams.base import Examples, Stream, Task
from cl_runner.streams.recipe import Recipe


class LwF(Taught):
    """On each new batch, keep answering for the old outputs as the model did before the task.

    With the pretrained model as a teacher, its own head's answers are kept as well, throughout (the paper's old task
    is such a pretrained one; peers distil from the previous task alone). The paper first trains the new outputs by
    themselves, which is left out here as it is there.
    """

    saved = (*Taught.saved, "old_groups")

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1.0,
        pretrained_strength: NonNegativeFloat | None = None,
        teacher: Source = "auto",
        temperature: PositiveFloat = 2.0,
        squared_temperature: bool = True,
        weighting: Literal["constant", "tasks", "average"] = "tasks",
        softmax: Literal["task", "joint", "all"] = "task",
    ) -> None:
        """`squared_temperature`: multiply by T^2, so that gradients do not shrink with it (Hinton et al., 2015; not in
        the paper); `softmax`: one for each earlier task's outputs, their losses averaged, one over all of them (joint),
        or one over all of the head, where outputs to come are active from the start; `weighting`: of the task's loss
        and of that distillation in task k = 1, 2, …: constant (1, 1), tasks (1, k-1), by which each earlier task counts
        once (the paper), or average (1/k, 1-1/k), the latter times `strength`; `pretrained_strength`: null for the same
        as `strength`."""
        self.strength = strength
        self.source: Source = teacher
        self.pretrained_strength = strength if pretrained_strength is None else pretrained_strength
        self.temperature, self.squared_temperature = temperature, squared_temperature
        self.weighting, self.softmax = weighting, softmax

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        check_source("strategy.teacher", self.source, model)
        self._check_softmax(stream.task_sizes or [], self.source != "previous" and model.has_pretrained_head)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.pretrained = frozen_copy(PretrainedView(model)) if wants_pretrained(self.source, model) else None
        self._check_softmax([len(task.classes) for task in stream.tasks], self.pretrained is not None)
        self.old_groups: list[Tensor] = []  # the earlier outputs, int64, for each softmax

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        groups = dict.fromkeys(earlier.classes for earlier in self.stream.tasks[: task.index])
        if self.softmax != "task" and groups:
            old = sorted({label for group in groups for label in group})
            groups = {tuple(old if self.softmax == "joint" else range(self.stream.num_classes)): None}
        self.old_groups = [torch.tensor(group, device=self.model.device) for group in groups]

    def _check_softmax(self, sizes: list[int], pretrained: bool) -> None:
        """Refuse a softmax that is 1 whatever the model says, where no `pretrained` teacher is there to hold to either;
        `sizes`: each task's number of classes, as far as known."""
        in_vain = len(sizes) > 1 and set(sizes) == {1} and wants_previous(self.source) and not pretrained
        if in_vain and self.softmax == "task":
            expected = "expected joint or all where every task has a single class (one output is nothing to tell apart)"
            raise ConfigError("strategy.softmax", f"{expected}, got 'task'; try strategy.softmax=joint")

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        weight = 1 / self.number if self.weighting == "average" else 1.0
        return weight * super().task_loss(batch, output)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        terms = {}
        if self.old_groups and wants_previous(self.source):
            weight = {"constant": 1.0, "tasks": self.number - 1, "average": 1 - 1 / self.number}[self.weighting]
            target = self.taught(output).logits
            losses = [self.distillation(output.logits[:, group], target[:, group]) for group in self.old_groups]
            terms["lwf"] = weight * self.strength * torch.stack(losses).mean()
        if self.pretrained is not None:
            with torch.no_grad():
                target = self.pretrained.encode(output.inputs).logits
            student = self.pretrained.head(output.features)
            terms["lwf_pretrained"] = self.pretrained_strength * self.distillation(student, target)
        return terms

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the batch of KL(teacher || student) at the temperature; [B, K] logits each, a scalar."""
        log_student = (student / self.temperature).log_softmax(1)
        log_teacher = (teacher / self.temperature).log_softmax(1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
        return divergence * self.temperature**2 if self.squared_temperature else divergence
