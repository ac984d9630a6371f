"""The weights that a penalty pulls towards, and how far the model is from them."""

from dataclasses import dataclass
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
Towards = Literal["zero", "previous", "pretrained"]


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


@dataclass(frozen=True)
class Anchor:
    """Weights to hold to, as they were when the anchor was set."""

    weights: Parameters
    rows: Tensor  # [K] bool: the head's rows that had been revealed; no anchor covers one that has learned nothing yet

    @classmethod
    def at(cls, model: Model, *, head: bool = True) -> "Anchor":
        weights = {name: value.detach().clone() for name, value in trainable(model, head=head).items()}
        return cls(weights, model.revealed)

    @property
    def covered(self) -> dict[str, Tensor]:
        """By name, the rows ([K] bool) of those parameters that are not covered whole."""
        return {name: self.rows for name in ("head.weight", "head.bias") if name in self.weights}

    def distance(self, live: Parameters) -> Parameters:
        """live - anchored, by name; zero for head rows that the anchor does not cover."""
        delta = {name: live[name] - value for name, value in self.weights.items()}
        for name in delta.keys() & {"head.weight", "head.bias"}:
            # A product, not an index: selecting rows by a mask would wait for the device.
            delta[name] = delta[name] * (self.rows[:, None] if name == "head.weight" else self.rows)
        return delta


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Anchor])


class NormPenalty(Strategy):
    """Fine-tune with a norm of the weights' distance from zero, the previous task's or the pretrained weights.

    The pretrained weights are the backbone's alone.
    """

    saved = ("anchors",)

    def __init__(self, strength: float, towards: Towards) -> None:
        self.strength, self.towards = strength, towards

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        if self.towards == "pretrained" and not model.pretrained:
            raise ConfigError(
                "strategy.towards", "expected zero or previous for a model without pretrained weights, got 'pretrained'"
            )

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.anchors = [Anchor.at(model, head=False)] if self.towards == "pretrained" else []

    def before_task(self, task: Task) -> None:
        if self.towards == "zero":
            zeros = {name: torch.zeros_like(value) for name, value in trainable(self.model).items()}
            self.anchors = [Anchor(zeros, self.model.revealed)]

    def after_task(self, task: Task) -> None:
        if self.towards == "previous":
            self.anchors = [Anchor.at(self.model)]

    def distances(self) -> list[Tensor]:
        """weights - anchor, a tensor a parameter; empty where nothing is anchored yet."""
        live = trainable(self.model)
        return [delta for anchor in self.anchors for delta in anchor.distance(live).values()]
