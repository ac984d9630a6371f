"""How a Fisher is held, and the quadratic that it makes."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

Parameters = dict[str, Tensor]  # by the names of `named_parameters()`


class Curvature(Protocol):
    """A positive semi-definite matrix F over a model's parameters."""

    def quadratic(self, delta: Parameters) -> Tensor:
        """delta' F delta, a scalar."""
        ...

    def product(self, delta: Parameters) -> Parameters:
        """F delta: half the gradient of the quadratic, in closed form."""
        ...

    def plus(self, other: Self, weight: float = 1.0) -> Self:
        """F + weight * other."""
        ...

    def scaled(self, factor: float) -> Self: ...

    def only(self, names: Container[str]) -> Self:
        """The block of these parameters, as if the others did not exist."""
        ...

    def trace(self) -> Tensor: ...


@dataclass(frozen=True)
class Diagonal:
    """diag(F): one non-negative number a parameter. Names that are absent have no curvature."""

    values: Parameters

    def quadratic(self, delta: Parameters) -> Tensor:
        terms = [(values * delta[name].square()).sum() for name, values in self.values.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def product(self, delta: Parameters) -> Parameters:
        return {name: values * delta[name] for name, values in self.values.items()}

    def plus(self, other: "Diagonal", weight: float = 1.0) -> "Diagonal":
        merged = dict(self.values)
        for name, values in other.values.items():
            merged[name] = merged[name] + weight * values if name in merged else weight * values
        return Diagonal(merged)

    def scaled(self, factor: float) -> "Diagonal":
        return Diagonal({name: factor * values for name, values in self.values.items()})

    def only(self, names: Container[str]) -> "Diagonal":
        return Diagonal({name: values for name, values in self.values.items() if name in names})

    def trace(self) -> Tensor:
        return torch.stack([values.sum() for values in self.values.values()]).sum() if self.values else torch.zeros(())


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Diagonal])
