"""Riemannian walk (Chaudhry et al., 2018, arXiv 1801.10112)."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Estimator
from cl_runner.models.model import Model, Output, trainable
from cl_runner.ranges import Count
from cl_runner.strategies.importance import PathIntegral
from cl_runner.streams.base import Examples, Stream, Task


class RWalk(PathIntegral):
    """Penalise changes of each weight by its Fisher, a moving average over training (EWC++), plus its score: the
    decrease of the loss per unit of KL divergence of the outputs that it caused; both scaled to [0, 1] (section 4.1).

    As in the authors' code, the loss excludes the penalty, and an increase within an interval counts as zero.
    Deviations: the Fisher comes from the given estimator, on the first batch of each interval, where the authors' code
    averages the squared mean gradients (fisher=batched) of all batches; it is scaled by the largest value only, since
    the smallest is practically 0.
    """

    saved = (*PathIntegral.saved, "average", "score", "past", "interval_start", "steps")
    name = "rwalk"
    unregularised = True

    def __init__(
        self,
        *,
        fisher: Estimator,
        strength: NonNegativeFloat = 1_000.0,
        alpha: Annotated[float, Field(gt=0, le=1)] = 0.9,
        interval: Count = 10,
        epsilon: PositiveFloat = 1e-3,
        head: bool = True,
    ) -> None:
        """`alpha`: the newest Fisher's share of the moving average; `interval`: steps between two updates of the Fisher
        and of the score; `epsilon`: added to the divergence; `head`: whether to penalise changes of the head too."""
        if fisher.representation != "diagonal":
            raise ConfigError("fisher.representation", f"expected diagonal for rwalk, got {fisher.representation}")
        super().__init__(strength, head)
        self.fisher, self.alpha, self.interval, self.epsilon = fisher, alpha, interval, epsilon

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.fisher.check(model, stream.image_shape)
        self.average = self.score = self.past = Diagonal({})
        self.interval_start: dict[str, Tensor] = {}  # the weights at the interval's beginning
        self.steps = 0  # steps in this task

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.score, self.steps = Diagonal({}), 0
        self._start_interval()

    def before_batch(self, batch: Examples) -> Examples:
        if self.steps % self.interval == 0:
            # A new seed, so that a random estimator's noise differs between batches.
            fisher = replace(self.fisher, seed=int(torch.randint(2**31, ())))
            found = fisher(self.model, batch).diagonal()
            old = self.average.scaled(1 - self.alpha)
            self.average = old.plus(found, self.alpha) if self.average.values else found
        return batch

    def after_step(self, batch: Examples, output: Output) -> None:
        super().after_step(batch, output)
        self.steps += 1
        if self.steps % self.interval == 0:
            self._end_interval()

    def after_task(self, task: Task) -> None:
        self._end_interval()
        self.past = self.past.plus(self.score).scaled(0.5) if self.past.values else self.score
        self.anchor(_scaled(self.anchored_part(self.average)).plus(_scaled(self.anchored_part(self.past))))

    @torch.no_grad()
    def _end_interval(self) -> None:
        """Add the current interval's part to the score."""
        gained, live = {}, trainable(self.model)
        for name, fisher in self.average.values.items():
            if name in self.path:
                divergence = fisher * (live[name] - self.interval_start[name]).square() / 2
                gained[name] = self.path[name].clamp(min=0) / (divergence + self.epsilon)
        self.score = self.score.plus(Diagonal(gained))
        self._start_interval()

    def _start_interval(self) -> None:
        live = trainable(self.model)
        self.path = {name: torch.zeros_like(value) for name, value in live.items()}
        self.interval_start = {name: value.detach().clone() for name, value in live.items()}


def _scaled(importance: Diagonal) -> Diagonal:
    """`importance`, scaled to a maximum of 1."""
    largest = max((values.max() for values in importance.values.values()), default=torch.zeros(()))
    return importance.scaled(float(1 / largest)) if largest > 0 else importance
