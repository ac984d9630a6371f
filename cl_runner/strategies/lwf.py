"""Learning without forgetting (Li & Hoiem, 2017, arXiv 1606.09282), also of the pretrained model."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model, Output, PretrainedView
from cl_runner.strategies.anchors import Source, check_source, wants_pretrained, wants_previous
from cl_runner.strategies.distillation import Distillation, frozen_copy, precise
from cl_runner.streams.base import Examples, Scenario, Stream, Task
from cl_runner.streams.recipe import Recipe

Softmax = Literal["task", "joint", "all"]


class LwF(Distillation):
    """On each new batch, distil the old outputs of the model before the task (eq. 2 and 3).

    With the pretrained model as a teacher, the outputs of its own head are distilled as well, in every task (the
    paper's old task is such a pretrained one; peers distil from the previous task alone). The paper first trains the
    new outputs by themselves, which peers and we leave out.
    """

    saved = (*Distillation.saved, "old_groups")
    active_logits = "current"  # as in the paper: the labels of new classes must not push down what is distilled

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1.0,
        pretrained_strength: NonNegativeFloat | None = None,
        teacher: Source = "auto",
        temperature: PositiveFloat = 2.0,
        squared_temperature: bool = True,
        weighting: Literal["constant", "tasks", "average"] = "tasks",
        softmax: Softmax | None = None,
    ) -> None:
        """`squared_temperature`: multiply by T^2, so that gradients do not shrink with T (Hinton et al., 2015; not in
        the paper); `softmax`: one over each earlier task's outputs, their losses averaged (task), one over all earlier
        outputs (joint), or one over the whole head, if future outputs are active from the start (all); null: joint
        where tasks' classes have to be told apart (the class scenario), else task, as in the paper; `weighting`: of
        the task's loss and of the distillation from the previous model in task k = 1, 2, …: constant (1, 1), tasks
        (1, k-1), so that each earlier task counts once (with softmax=task the paper's sum over them), or average
        (1/k, 1-1/k), the latter times `strength`; `pretrained_strength`: of the distillation from the pretrained model,
        the same in each task; null for the same as `strength`."""
        self.strength = strength
        self.source: Source = teacher
        self.pretrained_strength = strength if pretrained_strength is None else pretrained_strength
        self.temperature, self.squared_temperature = temperature, squared_temperature
        self.weighting = weighting
        self.softmax: Softmax | None = softmax

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        check_source("strategy.teacher", self.source, model)
        self._check_softmax(
            stream.scenario, stream.task_sizes or [], self.source != "previous" and model.has_pretrained_head
        )

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.pretrained = frozen_copy(PretrainedView(model)) if wants_pretrained(self.source, model) else None
        sizes = [len(task.classes) for task in stream.tasks]
        self._check_softmax(stream.scenario, sizes, self.pretrained is not None)
        self.old_groups: list[Tensor] = []  # int64: the earlier outputs in each softmax

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        groups = dict.fromkeys(earlier.classes for earlier in self.stream.tasks[: task.index])
        softmax = self._softmax(self.stream.scenario)
        if softmax != "task" and groups:
            old = self.stream.classes_before(task.index)
            groups = {tuple(old if softmax == "joint" else range(self.stream.num_classes)): None}
        self.old_groups = [torch.tensor(group, device=self.model.device) for group in groups]

    def _softmax(self, scenario: Scenario) -> Softmax:
        return self.softmax or ("joint" if scenario is Scenario.CLASS else "task")

    def _check_softmax(self, scenario: Scenario, sizes: list[int], pretrained: bool) -> None:
        """Refuse a softmax over single outputs, which is always 1, without a `pretrained` teacher to distil instead.

        `sizes`: each task's number of classes, as far as known.
        """
        in_vain = len(sizes) > 1 and set(sizes) == {1} and wants_previous(self.source) and not pretrained
        if in_vain and self._softmax(scenario) == "task":
            expected = (
                "expected joint or all where every task has a single class (a softmax over one output is constant)"
            )
            raise ConfigError("strategy.softmax", f"{expected}, got 'task'; try strategy.softmax=joint")

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        weight = 1 / self.number if self.weighting == "average" else 1.0
        return weight * super().task_loss(batch, output)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        terms = {}
        if self.old_groups and wants_previous(self.source):
            weight = {"constant": 1.0, "tasks": self.number - 1, "average": 1 - 1 / self.number}[self.weighting]
            target = self.teacher_output(output).logits
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
        log_student = (precise(student) / self.temperature).log_softmax(1)
        log_teacher = (precise(teacher) / self.temperature).log_softmax(1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
        return divergence * self.temperature**2 if self.squared_temperature else divergence
