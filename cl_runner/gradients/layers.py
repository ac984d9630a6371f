"""Rules that turn a layer's input and output gradient into its parameters' per-sample gradients.

Every layer can return these gradients (`per_sample`, the definition), or add the sum over samples of their squares to a
total without storing them (`add_squares`, the fast equivalent). Summing a gradient over positions and then squaring it
takes no more arithmetic than the ordinary gradient; what costs libraries time is the memory of the block [B, *weight].
Here that block is never larger than a cache, and on CUDA the fused kernels never write it at all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cl_runner.gradients import kernels
from cl_runner.gradients.kernels import Adder, Precision
from cl_runner.gradients.products import (
    ROOM,
    add_gram,
    add_product_squares,
    add_squares,
    gram_is_cheaper,
    pairs,
    rounded,
    slices,
)
from cl_runner.models.model import Parameters


class Uncovered(Exception):  # noqa: N818
    """A trainable parameter is used in a way that no rule covers."""


class DependenceError(ValueError):
    """A model's answer to a sample depends on the other samples of its batch, or on chance."""

    def __init__(self, how: str) -> None:
        super().__init__(f"expected a model that answers each sample alone and always alike, got one {how}")


class BatchStatisticsError(DependenceError):
    """A layer normalises by the statistics of its batch."""


class Use(ABC):
    """One call of a layer in a forward pass.

    names: role -> the name of the trainable parameter in that role.
    inputs: the layer's input, [B, ...].
    passes: how many backward passes there will be.
    precision: of products of gradients and inputs over positions; plain sums over positions keep that of the gradients.
    waits: whether `add_squares` must synchronise with the device.
    """

    passes: int = 1
    precision: Precision = "fp32"
    waits: ClassVar[bool] = False

    def __init__(self, names: dict[str, str], inputs: Tensor) -> None:
        self.names, self.inputs = names, inputs.detach()
        self._version = inputs._version

    def check_unchanged(self) -> None:
        """Raises Uncovered if the inputs were modified after the call."""
        if self.inputs._version != self._version:
            raise Uncovered(f"the inputs of {', '.join(self.names.values())} are changed in place afterwards")

    @abstractmethod
    def per_sample(self, gradient: Tensor) -> Parameters:
        """parameter -> its per-sample gradient [B, *shape] (flat if a view was used), from the output's `gradient`."""

    def add_squares(self, gradient: Tensor, totals: Parameters) -> None:
        """Add the squared gradients, summed over samples, to `totals` [*shape] in place, maybe only at `flush` or
        `close`."""
        for name, values in self.per_sample(gradient).items():
            add_squares(totals[name], values)

    def flush(self, totals: Parameters) -> None:  # noqa: B027
        """End a block of passes: add what is faster to add together."""

    def forget(self) -> None:  # noqa: B027
        """Drop what waits for the end of a block of passes that was cut short and will be repeated."""

    def close(self, totals: Parameters) -> None:  # noqa: B027
        """End the last pass: add what was held back."""

    def release(self) -> None:
        """Free the inputs, as a plain backward pass does once it is through a layer."""
        self.inputs = self.inputs.new_empty(0)


class Weighted(Use):
    """A layer whose weight's gradient is a sum of products over positions.

    held: products of pairs of gradients, summed over passes; None while there are none.
    waiting: gradients of passes that a kernel will take together.
    """

    def __init__(self, names: dict[str, str], inputs: Tensor) -> None:
        super().__init__(names, inputs)
        self.held: Tensor | None = None
        self.waiting: list[Tensor] = []

    def flush(self, totals: Parameters) -> None:
        if not self.waiting:
            return
        gradients = self.waiting[0][None] if len(self.waiting) == 1 else torch.stack(self.waiting)
        self.waiting.clear()

        def eagerly(total: Tensor) -> None:
            for gradient in gradients:
                self.add_weight_squares(total, gradient)

        self.add_fused_squares(totals[self.names["weight"]], gradients, eagerly)

    def forget(self) -> None:
        self.waiting.clear()

    @abstractmethod
    def add_weight_squares(self, total: Tensor, gradient: Tensor) -> None:
        """Add the squared weight gradients, summed over samples, to `total`, without a fused kernel."""

    @abstractmethod
    def add_fused_squares(self, total: Tensor, gradients: Tensor, rival: Adder) -> None:
        """The same for several passes [V, B, ...], by a fused kernel, or by `rival` where that is faster."""


class Linear(Weighted):
    """y = x Wᵀ + b over any number of positions: W's gradient is the sum over a sample's positions of g xᵀ."""

    def __init__(self, names: dict[str, str], inputs: Tensor) -> None:
        super().__init__(names, inputs)
        self.rows = self.inputs.flatten(1, -2) if inputs.dim() > 2 else self.inputs[:, None]  # [B, T, K]

    def release(self) -> None:
        super().release()
        self.rows = self.inputs

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """[B, T, N]."""
        return gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]

    def per_sample(self, gradient: Tensor) -> Parameters:
        rows = self.gradient_rows(gradient)
        found = {}
        if "weight" in self.names:
            found[self.names["weight"]] = rows.transpose(1, 2) @ self.rows
        if "bias" in self.names:
            found[self.names["bias"]] = rows.sum(1)
        return found

    def add_squares(self, gradient: Tensor, totals: Parameters) -> None:
        rows = self.gradient_rows(gradient)
        if gram_is_cheaper(rows.shape[1], self.passes, rows.device):
            # Σ_v (Σ_t g_t x_t)² = Σ_{t,t'} (Σ_v g_t g_t') x_t x_t': one matrix product for all passes together.
            self.held = pairs(rows, weighted=True, onto=self.held)
            return
        if "bias" in self.names:
            add_squares(totals[self.names["bias"]], rows.sum(1))
        if "weight" not in self.names:
            return
        if kernels.available(rows.device):
            self.waiting.append(rows)
        else:
            self.add_weight_squares(totals[self.names["weight"]], rows)

    def add_weight_squares(self, total: Tensor, gradient: Tensor) -> None:
        """`gradient`: [B, T, N]."""
        add_product_squares(total, rounded(gradient, self.precision), rounded(self.rows, self.precision))

    def add_fused_squares(self, total: Tensor, gradients: Tensor, rival: Adder) -> None:
        total = total.view(gradients.shape[3], -1)
        kernels.add_linear_squares(total, gradients, self.rows, self.precision, rival)

    def close(self, totals: Parameters) -> None:
        if self.held is None:
            return
        if "bias" in self.names:
            totals[self.names["bias"]] += self.held.sum((0, 1)).view_as(totals[self.names["bias"]]).clamp_min_(0)
        if "weight" in self.names:
            add_gram(totals[self.names["weight"]], self.held, lambda some: self.rows[some])
        self.held = None


class Affine(Use):
    """The affine part of a normalisation, y = w x̂ + b: the gradients are sums of g x̂ and g over positions."""

    def __init__(
        self,
        names: dict[str, str],
        inputs: Tensor,
        normalised: Callable[[Tensor], Tensor],
        axes: Sequence[int],
        scale: Tensor | None = None,
    ) -> None:
        """`axes`: those over which a weight is shared, except the samples' axis; `scale`: a factor that `normalised`
        leaves out of x̂, where it is the same for all positions and samples: in the shape of the weight."""
        super().__init__(names, inputs)
        self.normalised, self.axes, self.scale = normalised, list(axes), scale

    def per_sample(self, gradient: Tensor) -> Parameters:
        # On the CPU a few samples at a time, so that what is written stays in the cache until it is read.
        room = None if gradient.device.type == "cpu" else ROOM
        parts = [self._some(some, gradient) for some in slices(len(gradient), gradient[0].numel(), room)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]

    def _some(self, some: slice, gradient: Tensor) -> Parameters:
        g, found = gradient[some], {}
        if "weight" in self.names:
            sums = self._summed(self.normalised(self.inputs[some]).mul_(g))
            found[self.names["weight"]] = sums if self.scale is None else sums * self.scale
        if "bias" in self.names:
            found[self.names["bias"]] = self._summed(g)
        return found

    def _summed(self, values: Tensor) -> Tensor:
        return values.sum(self.axes) if self.axes else values


class Embedding(Use):
    """An embedding table: a row's gradient is the sum over the positions that looked it up."""

    waits = True

    def __init__(self, names: dict[str, str], inputs: Tensor, padding: int | None) -> None:
        super().__init__(names, inputs)
        self.padding = padding

    def per_sample(self, gradient: Tensor) -> Parameters:
        name = self.names["weight"]
        raise Uncovered(f"per-sample gradients of the table {name} would be too large")

    def add_squares(self, gradient: Tensor, totals: Parameters) -> None:
        total = totals[self.names["weight"]]
        gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1])
        for looked_up, rows in zip(self.inputs.reshape(len(gradient), -1), gradient, strict=True):
            kept = looked_up != self.padding if self.padding is not None else slice(None)
            there, position = looked_up[kept].unique(return_inverse=True)
            sums = rows.new_zeros(len(there), rows.shape[1]).index_add_(0, position, rows[kept])
            total.index_add_(0, there, sums.square())


class Direct(Use):
    """A parameter that is used directly (class token, position embedding, layer scale), once per sample."""

    def per_sample(self, gradient: Tensor) -> Parameters:
        return {self.names["values"]: gradient}
