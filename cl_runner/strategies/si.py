"""Synaptic intelligence (Zenke et al., 2017, arXiv 1703.04200)."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from cl_runner.fisher.curvature import Diagonal
from cl_runner.models.model import Model, Parameters, trainable
from cl_runner.strategies.importance import Accumulation, PathIntegral
from cl_runner.streams.base import Stream, Task


class SI(PathIntegral):
    """Penalise changes of each weight by how much it lowered the losses of earlier tasks for the distance it moved:
    by the sum over tasks of path / (distance^2 + epsilon) (eq. 4, 5)."""

    saved = (*PathIntegral.saved, "start")
    name = "si"

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 100_000.0,
        epsilon: PositiveFloat = 0.1,
        gradient: Literal["total", "task"] = "total",
        negative: Literal["keep", "drop"] = "keep",
        accumulation: Accumulation = "sum",
        head: bool = True,
    ) -> None:
        """`strength`: the paper's c, which is about 1 there, where nets are trained from scratch: weights that are
        fine-tuned move so little beside its damping, `epsilon`, that 1 holds nothing; `gradient`: in the path integral,
        of the whole loss (van de Ven's code), or without SI's own penalty (the paper's eq. 3, and its authors' code);
        `negative`: whether to keep a negative importance, of a weight that raised the losses (eq. 5; such a weight is
        pushed away), or to drop it from the sum over tasks (the authors' code); `accumulation`: over tasks, the paper's
        sum, or an average in which each class counts once; `head`: whether to penalise changes of the head too."""
        super().__init__(strength, head)
        self.epsilon, self.negative = epsilon, negative
        self.unregularised = gradient == "task"
        self.accumulation: Accumulation = accumulation

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.start: Parameters = {}

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.start = {name: value.detach().clone() for name, value in trainable(self.model).items()}

    def after_task(self, task: Task) -> None:
        importance = {
            name: self.path[name] / ((value.detach() - self.start[name]).square() + self.epsilon)
            for name, value in trainable(self.model).items()
        }
        total = self.accumulated(Diagonal(importance), task, self.accumulation)
        if self.negative == "drop":
            total = Diagonal({name: values.clamp(min=0) for name, values in total.values.items()})
        self.anchor(total)
