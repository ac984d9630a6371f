"""Base classes of methods that penalise changes of each weight since the last task by an importance of its own."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.quadratic import Penalty
from cl_runner.models.model import Model, Output, Parameters, trainable
from cl_runner.strategies.anchors import Anchor, covered, share_of_classes
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task

Accumulation = Literal["sum", "average"]


class Importance(Strategy):
    """Add strength * sum_i importance_i (w_i - w*_i)^2 to the loss, where w* are the weights after the last task.

    Head rows that no loss had seen by then are left out.
    """

    saved = ("penalty",)
    holds_earlier_weights = True
    name: ClassVar[str]  # the penalty's

    def __init__(self, strength: float, head: bool) -> None:
        """`head`: whether to penalise changes of the head too."""
        self.strength, self.head = strength, head

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.penalty = Penalty()

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if not self.penalty.terms:
            return {}
        return {self.name: self.strength * self.penalty(dict(self.model.named_parameters()))}

    @property
    def importance(self) -> Diagonal:
        """The importances in force; empty before the first task has been learned."""
        return self.penalty.terms[0].curvature.diagonal() if self.penalty.terms else Diagonal({})

    def accumulated(self, importance: Diagonal, task: Task, accumulation: Accumulation) -> Diagonal:
        """The importance over all tasks so far, given that of `task`: a sum, or an average in which each class counts
        once."""
        if accumulation == "sum":
            return self.importance.plus(importance)
        share = share_of_classes(task, self.stream)
        return self.importance.scaled(1 - share).plus(importance, share)

    def anchored_part(self, importance: Diagonal) -> Diagonal:
        """The part of `importance` for the weights and head rows that can be anchored now."""
        return covered(importance, self.model, head=self.head)

    def anchor(self, importance: Diagonal) -> None:
        """Anchor the weights where they are now, with `importance` in place of any earlier one."""
        here = Anchor.at(self.model, head=self.head)
        if here.weights:
            self.penalty = Penalty().plus(self.anchored_part(importance), here.weights)


class PathIntegral(Importance):
    """Track how much each weight contributes to the decrease of the loss: the sum over steps of -gradient * step."""

    saved = (*Importance.saved, "path")
    measures_steps = True
    unregularised: bool = False  # leave the method's own penalty out of the gradient

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.path: Parameters = {}
        self._before: Parameters = {}  # weights before the current step, and its gradients below
        self._slopes: Parameters = {}

    def before_task(self, task: Task) -> None:
        self.path = {name: torch.zeros_like(value) for name, value in trainable(self.model).items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        live = trainable(self.model)
        # Copies, since the gradients may still be clipped in place.
        self._slopes = _copied({name: p.grad for name, p in live.items() if p.grad is not None}, self._slopes)
        self._before = _copied({name: live[name].detach() for name in self._slopes}, self._before)
        for term in self.penalty.terms if self.unregularised else ():
            pull = term.curvature.product({name: live[name] - value for name, value in term.anchor.items()})
            for name in self._slopes.keys() & pull.keys():
                self._slopes[name] -= 2 * self.strength * pull[name]

    @torch.no_grad()
    def after_step(self, batch: Examples, output: Output) -> None:
        if not self._slopes:
            return
        live = trainable(self.model)
        paths, slopes, before, now = (
            [of[name] for name in self._slopes] for of in (self.path, self._slopes, self._before, live)
        )
        torch.ops.aten._foreach_sub_.List(before, now)  # in place: from here on minus the step
        torch.ops.aten._foreach_addcmul_.Scalar(paths, slopes, before)


def _copied(values: Parameters, tensors: Parameters) -> Parameters:
    """A copy of `values`, reusing `tensors` where they exist: allocating would take ten times as long on the CPU, in
    page faults."""
    held = {name: tensors[name] if name in tensors else torch.empty_like(value) for name, value in values.items()}
    if held:
        torch.ops.aten._foreach_copy_.default(list(held.values()), list(values.values()))
    return held
