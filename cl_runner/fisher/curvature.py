"""How a Fisher is represented, and the quadratic form that it defines."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from cl_runner.models.heads import per_row
from cl_runner.models.model import Parameters


class Curvature(Protocol):
    """A positive semi-definite matrix F over a model's parameters."""

    def quadratic(self, delta: Parameters) -> Tensor:
        """delta' F delta, a scalar."""
        ...

    def product(self, delta: Parameters) -> Parameters:
        """F delta, in new tensors: half the gradient of the quadratic, in closed form."""
        ...

    def plus(self, other: Self, weight: float = 1.0) -> Self:
        """F + weight * other."""
        ...

    def scaled(self, factor: float) -> Self: ...

    def only(self, names: Container[str]) -> Self:
        """The block of these parameters, as if the others did not exist."""
        ...

    def only_rows(self, rows: dict[str, Tensor]) -> Self:
        """P F P, where P drops the rows (along the first dimension) for which `rows` (name -> [K] bool) is false.

        Parameters not named keep all their rows.
        """
        ...

    def merged(
        self, anchor: Parameters, other: "Curvature", other_anchor: Parameters
    ) -> tuple[Self, Parameters, Tensor] | None:
        """(w - anchor)' F (w - anchor) plus the same for the other, as one quadratic: its matrix, its minimiser and its
        minimum (a non-negative scalar).

        None where one matrix cannot represent both, so that their sum keeps a term for each.
        """
        ...

    def trace(self) -> Tensor: ...

    def diagonal(self) -> "Diagonal": ...


@dataclass(frozen=True)
class Diagonal:
    """diag(F): one non-negative number per weight. Absent names have no curvature."""

    values: Parameters

    def quadratic(self, delta: Parameters) -> Tensor:
        terms = [(values * delta[name].square()).sum() for name, values in self.values.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def product(self, delta: Parameters) -> Parameters:
        if not self.values:
            return {}
        moved = [delta[name] for name in self.values]
        # By their overloads, here and elsewhere: torch does not export its `_foreach_*` to type checkers.
        return dict(zip(self.values, torch.ops.aten._foreach_mul.List(list(self.values.values()), moved), strict=True))

    def plus(self, other: "Diagonal", weight: float = 1.0) -> "Diagonal":
        merged = dict(self.values)
        for name, values in other.values.items():
            merged[name] = merged[name] + weight * values if name in merged else weight * values
        return Diagonal(merged)

    def scaled(self, factor: float) -> "Diagonal":
        return Diagonal({name: factor * values for name, values in self.values.items()})

    def only(self, names: Container[str]) -> "Diagonal":
        return Diagonal({name: values for name, values in self.values.items() if name in names})

    def only_rows(self, rows: dict[str, Tensor]) -> "Diagonal":
        kept = {name: per_row(mask, self.values[name]) for name, mask in rows.items() if name in self.values}
        return Diagonal(self.values | {name: self.values[name] * mask for name, mask in kept.items()})

    def merged(
        self, anchor: Parameters, other: Curvature, other_anchor: Parameters
    ) -> tuple["Diagonal", Parameters, Tensor] | None:
        """Where neither has curvature, the anchor stays; what only one of them names keeps that one's values."""
        if not isinstance(other, Diagonal):
            return None
        # Completing the square, weight by weight:
        #     F1 (w - m1)² + F2 (w - m2)² = (F1 + F2) (w - m)² + F1 r (m2 - m1)²
        #     with r = F2 / (F1 + F2), m = m1 + r (m2 - m1).
        # This avoids small differences of large numbers. The shorter w'Fw - 2 b'w + c does not: where anchors are
        # closer to each other than to zero, it would leave float32 with few digits, or none.
        values = self.values | other.values
        means = {name: other_anchor[name] if name in other.values else anchor[name] for name in values}
        least = [next(iter(anchor.values()), torch.zeros(())).new_zeros(())]
        for name in [name for name in self.values if name in other.values]:
            one, two = self.values[name], other.values[name]
            values[name] = one + two
            share = torch.where(values[name] > 0, two / values[name], 0)
            # lerp is exact at both ends: a weight with curvature in only one of them keeps that one's anchor.
            means[name] = torch.lerp(anchor[name], other_anchor[name], share)
            least.append((one * share * (other_anchor[name] - anchor[name]).square()).sum())
        return Diagonal(values), means, torch.stack(least).sum()

    def diagonal(self) -> "Diagonal":
        return self

    def trace(self) -> Tensor:
        return torch.stack([values.sum() for values in self.values.values()]).sum() if self.values else torch.zeros(())


def finite(fisher: Curvature) -> Curvature:
    """Return `fisher`. Raises ValueError, naming a parameter, if it is not finite."""
    if not torch.isfinite(fisher.trace()):  # waits for the device
        for name, values in fisher.diagonal().values.items():
            if not values.isfinite().all():
                raise ValueError(f"the estimate for {name} is not finite: the model has diverged, or nearly so")
    return fisher


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Diagonal])
