"""The weights that a penalty pulls towards, and how far the model is from them."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Curvature
from cl_runner.models.architecture import Architecture
from cl_runner.models.heads import per_row
from cl_runner.models.model import Model, Parameters, trainable
from cl_runner.streams.base import Stream, Task

HEAD = {"head.weight", "head.bias"}  # the parameters of which an anchor covers some rows only
Matrix = TypeVar("Matrix", bound=Curvature)
Source = Literal["auto", "previous", "pretrained", "both"]


def check_source(field: str, source: Source, model: Architecture) -> None:
    """Refuse an explicit `pretrained` or `both` for a model that has no pretrained head."""
    if source in ("pretrained", "both") and not model.has_pretrained_head:
        raise ConfigError(
            field,
            f"expected auto or previous for a model without a pretrained head, whose outputs would be preserved, got "
            f"{source!r}; give model.pretrained weights that include their classifier",
        )


def wants_pretrained(source: Source, model: Model) -> bool:
    return source in ("pretrained", "both") or (source == "auto" and model.pretrained_head is not None)


def wants_previous(source: Source) -> bool:
    return source != "pretrained"


@dataclass(frozen=True)
class Anchor:
    """Weights to stay close to, as they were when the anchor was set."""

    weights: Parameters
    rows: Tensor  # [K] bool: the head's rows that had been revealed; no anchor covers one that has learned nothing yet

    @classmethod
    def at(cls, model: Model, *, head: bool = True) -> "Anchor":
        weights = {name: value.detach().clone() for name, value in trainable(model, head=head).items()}
        return cls(weights, model.revealed)

    @classmethod
    def at_pretrained(cls, model: Model) -> "Anchor":
        """The backbone's weights alone, to be taken before the first task, when they are the pretrained ones."""
        live = trainable(model.backbone)
        return cls({f"backbone.{name}": value.detach().clone() for name, value in live.items()}, model.revealed)

    def distance(self, live: Parameters) -> Parameters:
        """live - anchored, by name; zero for head rows that the anchor does not cover."""
        delta = {name: live[name] - value for name, value in self.weights.items()}
        for name in delta.keys() & HEAD:
            # A product, not an index: selecting rows by a mask would wait for the device.
            delta[name] = delta[name] * per_row(self.rows, delta[name])
        return delta


def covered(curvature: Matrix, model: Model, *, head: bool = True) -> Matrix:
    """The part of `curvature` that `Anchor.at(model, head=head)` would cover."""
    live = trainable(model, head=head)
    return curvature.only(live).only_rows({name: model.revealed for name in HEAD if name in live})


def share_of_classes(task: Task, stream: Stream) -> float:
    """The share of `task` in the classes so far: its weight in an average in which each class counts once."""
    return len(task.classes) / sum(len(each.classes) for each in stream.tasks[: task.index + 1])


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Anchor])
