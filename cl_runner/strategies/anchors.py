"""The weights that a penalty pulls towards, and how far the model is from them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Parameters
from cl_runner.models.architecture import Architecture
from cl_runner.models.heads import per_row
from cl_runner.models.model import Model, trainable

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
            delta[name] = delta[name] * per_row(self.rows, delta[name])
        return delta


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Anchor])
