"""The weights that a penalty pulls towards, and how far the model is from them."""

from typing import Literal

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Parameters
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Stream, Task
from cl_runner.streams.recipe import Recipe

Source = Literal["auto", "previous", "pretrained", "both"]


def check_source(field: str, source: Source, model: Architecture) -> None:
    """Refuse an explicit `pretrained` or `both` for a model that has no pretrained head."""
    if source in ("pretrained", "both") and not model.has_pretrained_head:
        raise ConfigError(
            field,
            f"expected auto or previous for a model without a pretrained head (none is there to say what the "
            f"pretrained model knew), got {source!r}; give model.pretrained weights that bring their classifier",
        )


def wants_pretrained(source: Source, model: Model) -> bool:
    return source in ("pretrained", "both") or (source == "auto" and model.pretrained_head is not None)


def wants_previous(source: Source) -> bool:
    return source != "pretrained"


def trainable(model: torch.nn.Module, *, head: bool = True) -> Parameters:
    """The parameters that learn, by name: the live ones, not copies."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (head or name.startswith("backbone."))
    }


def snapshot(parameters: Parameters) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def difference(parameters: Parameters, anchor: Parameters) -> Parameters:
    """parameters - anchor, for the anchor's names."""
    return {name: parameters[name] - value for name, value in anchor.items()}


class NormPenalty(Strategy):
    """Fine-tune with a norm of the weights' distance from zero, the previous task's or the pretrained weights.

    The head takes part with the rows that were revealed before the anchor was set: no anchor covers a row that has
    not learned anything yet. The pretrained weights are the backbone's alone.
    """

    saved = ("anchor", "rows")

    def __init__(self, strength: float, towards: Literal["zero", "previous", "pretrained"]) -> None:
        self.strength, self.towards = strength, towards

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        if self.towards == "pretrained" and not model.pretrained:
            raise ConfigError(
                "strategy.towards", "expected zero or previous for a model without pretrained weights, got 'pretrained'"
            )

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.rows = model.revealed
        self.anchor: Parameters = {}
        if self.towards == "pretrained":
            self.anchor = snapshot(trainable(model, head=False))

    def before_task(self, task: Task) -> None:
        if self.towards == "zero":
            self.rows = self.model.revealed
            self.anchor = {name: torch.zeros_like(value) for name, value in trainable(self.model).items()}

    def after_task(self, task: Task) -> None:
        if self.towards == "previous":
            self.rows = self.model.revealed
            self.anchor = snapshot(trainable(self.model))

    def distances(self) -> list[Tensor]:
        """weights - anchor, a tensor a parameter."""
        delta = difference(trainable(self.model), self.anchor)
        return [value[self.rows] if name.startswith("head.") else value for name, value in delta.items()]
