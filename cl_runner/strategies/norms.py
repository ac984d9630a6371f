"""Base class of the L1 and L2 penalties, which pull all weights towards an anchor, with one strength."""

from typing import Literal

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model, trainable
from cl_runner.strategies.anchors import Anchor
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Stream, Task
from cl_runner.streams.recipe import Recipe

Towards = Literal["zero", "previous", "pretrained"]


class NormPenalty(Strategy):
    """Penalise a norm of the weights' distance from zero, the previous task's or the pretrained weights.

    Pretrained weights are the backbone's alone.
    """

    saved = ("anchor",)

    def __init__(self, strength: float, towards: Towards) -> None:
        self.strength, self.towards = strength, towards

    @property
    def holds_earlier_weights(self) -> bool:
        return self.towards == "previous"

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        if self.towards == "pretrained" and not model.pretrained:
            raise ConfigError(
                "strategy.towards", "expected zero or previous for a model without pretrained weights, got 'pretrained'"
            )

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.anchor: Anchor | None = None

    def before_task(self, task: Task) -> None:
        if self.towards == "zero":
            zeros = {name: torch.zeros_like(value) for name, value in trainable(self.model).items()}
            self.anchor = Anchor(zeros, self.model.revealed)
        elif self.towards == "pretrained" and task.index == 0:
            self.anchor = Anchor.at_pretrained(self.model)

    def after_task(self, task: Task) -> None:
        if self.towards == "previous":
            self.anchor = Anchor.at(self.model)

    def distances(self) -> list[Tensor]:
        """weights - anchor, one tensor per parameter; empty if nothing is anchored yet."""
        return list(self.anchor.distance(trainable(self.model)).values()) if self.anchor else []
