"""What methods share that hold each weight by a number of its own, around the weights of the last task."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_runner.fisher.curvature import Diagonal, Parameters
from cl_runner.fisher.quadratic import Penalty
from cl_runner.models.model import Model, Output, trainable
from cl_runner.strategies.anchors import Anchor, covered, share_of_classes
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task

Accumulation = Literal["sum", "average"]


class Importance(Strategy):
    """The loss gains strength * sum_i importance_i (w_i - w*_i)^2, w* the weights after the last task, without the head
    rows that no loss had seen by then."""

    saved = ("held",)
    holds_earlier_weights = True
    name: ClassVar[str]  # of the penalty

    def __init__(self, strength: float, head: bool) -> None:
        """`head`: whether the head is held too."""
        self.strength, self.head = strength, head

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.held = Penalty()

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if not self.held.terms:
            return {}
        return {self.name: self.strength * self.held(dict(self.model.named_parameters()))}

    @property
    def importance(self) -> Diagonal:
        """By which the weights are held; empty before any are."""
        return self.held.terms[0].curvature.diagonal() if self.held.terms else Diagonal({})

    def accumulated(self, importance: Diagonal, task: Task, accumulation: Accumulation) -> Diagonal:
        """That of all tasks so far, from that of `task`: a sum, or an average in which each class counts once."""
        if accumulation == "sum":
            return self.importance.plus(importance)
        share = share_of_classes(task, self.stream)
        return self.importance.scaled(1 - share).plus(importance, share)

    def of_held(self, importance: Diagonal) -> Diagonal:
        """Of `importance`, that of the weights and rows that can be held now."""
        return covered(importance, self.model, head=self.head)

    def hold(self, importance: Diagonal) -> None:
        """Hold the weights as they are now, by `importance` alone."""
        anchor = Anchor.at(self.model, head=self.head)
        if anchor.weights:
            self.held = Penalty().plus(self.of_held(importance), anchor.weights)


class PathIntegral(Importance):
    """Follows what each weight has contributed to the fall of the loss: the sum over steps of -gradient * step."""

    saved = (*Importance.saved, "path")
    measures_steps = True
    unregularised: bool = False  # the gradient without that of the own penalty

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.path: Parameters = {}
        self._before: Parameters = {}  # of the step being made: the weights, and the gradient
        self._slopes: Parameters = {}

    def before_task(self, task: Task) -> None:
        self.path = {name: torch.zeros_like(value) for name, value in trainable(self.model).items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        live = trainable(self.model)
        # Copies: the gradients may yet be clipped, in place.
        self._slopes = _copied({name: p.grad for name, p in live.items() if p.grad is not None}, self._slopes)
        self._before = _copied({name: live[name].detach() for name in self._slopes}, self._before)
        for term in self.held.terms if self.unregularised else ():
            pull = term.curvature.product({name: live[name] - value for name, value in term.anchor.items()})
            for name in self._slopes.keys() & pull.keys():
                self._slopes[name] -= 2 * self.strength * pull[name]

    @torch.no_grad()
    def after_step(self, batch: Examples, output: Output) -> None:
        if not self._slopes:
            return
        live = trainable(self.model)
        paths, slopes, steps, now = (
            [of[name] for name in self._slopes] for of in (self.path, self._slopes, self._before, live)
        )
        torch.ops.aten._foreach_sub_.List(steps, now)  # minus the step
        torch.ops.aten._foreach_addcmul_.Scalar(paths, slopes, steps)


def _copied(values: Parameters, tensors: Parameters) -> Parameters:
    """`values`, written into `tensors` where those are there: fresh ones would take ten times as long on the CPU, all
    of it page faults."""
    held = {name: tensors[name] if name in tensors else torch.empty_like(value) for name, value in values.items()}
    if held:
        torch.ops.aten._foreach_copy_.default(list(held.values()), list(values.values()))
    return held
