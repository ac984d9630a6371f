"""Mean magnitudes of per-sample gradients, where a Fisher has their squares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Diagonal, Parameters
from cl_runner.fisher.engine import Sums
from cl_runner.fisher.estimators import Estimator
from cl_runner.fisher.layers import Linear, Uncovered, Use
from cl_runner.fisher.passes import Vectors, shared_parameters, zeros
from cl_runner.fisher.per_sample import even_slices, looped_gradients, vmapped_gradients
from cl_runner.fisher.products import ROOM
from cl_runner.fisher.taps import Taps
from cl_runner.fisher.trial import objection, refuse_dependence
from cl_runner.models.model import Model, PretrainedView, trainable
from cl_runner.streams.base import Examples

Measure = Callable[[Tensor], Tensor]  # of a gradient's every number, with measure(a b) = measure(a) measure(b)


class Adds(Protocol):
    """Adds Σ measure(vᵀ ∂z/∂θ), summed over `inputs` [B, ...], to `totals` in place; `vectors`: logits -> [B, 1, K]."""

    def __call__(
        self, model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, *, measure: Measure
    ) -> None: ...


@dataclass(kw_only=True)
class Magnitudes(Estimator):
    """How far each weight moves the outputs: the mean of |∂‖z‖²/∂θ| over samples, z the outputs that enter (Aljundi et
    al., 2018, https://arxiv.org/abs/1711.09601, eq. 2 and 3). Not a Fisher.

    The mean is of each sample's own magnitude; that of a batch's mean gradient, which much code takes, would shrink as
    the batch grows.
    """

    def __post_init__(self) -> None:
        """Raises ConfigError for what has no meaning here."""
        for field, only in (("precision", "fp32"), ("representation", "diagonal")):
            if (value := getattr(self, field)) != only:
                raise ConfigError(f"fisher.{field}", f"expected {only} for magnitudes, got {value}")

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        return 2 * logits.masked_fill(logits == -torch.inf, 0)[:, None]

    def _mean(
        self, model: Model | PretrainedView, prepared: Examples, generator: torch.Generator
    ) -> tuple[Diagonal, int]:
        parameters = trainable(model)
        sums, add = Sums(zeros(model)), None
        largest = max((values.numel() for values in parameters.values()), default=1)
        for batch, _, vectors in self._batches(model, prepared, generator):
            with torch.no_grad():
                inputs = model.preprocess(batch.images)
            add = add or _way_for(model, inputs[[0, -1]])
            for rows in even_slices(len(inputs), max(1, ROOM // largest)):
                some = inputs[rows], partial(vectors, rows)
                try:
                    add(model, sums.partial, *some, measure=torch.abs)
                except Uncovered:  # before anything was added: this batch takes part in another way than the first
                    add = add_looped
                    add(model, sums.partial, *some, measure=torch.abs)
            sums.close_batch()
        means = sums.over(len(prepared))
        return Diagonal({name: torch.empty_like(p).copy_(means[name]) for name, p in parameters.items()}), len(prepared)


def _way_for(model: Model | PretrainedView, pair: Tensor) -> Adds:
    """The fastest way whose squares agree with those of plain autograd on two images."""
    for way in (add_tapped, add_vmapped):
        if objection(model, pair, partial(way, measure=torch.square)) is None:
            return way
        refuse_dependence(model, pair)
    return add_looped


def add_tapped(
    model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, *, measure: Measure
) -> None:
    taps = Taps(model, inputs)
    shared, summed = shared_parameters(taps), {}

    def receive(use: Use, gradient: Tensor) -> None:
        if isinstance(use, Linear) and use.inputs.dim() == 2 and shared.isdisjoint(use.names.values()):
            # An outer product's magnitudes are those of its factors, so no sample's is ever made.
            if "weight" in use.names:
                total = totals[use.names["weight"]]
                total += (measure(gradient).T @ measure(use.inputs)).view_as(total)
            if "bias" in use.names:
                totals[use.names["bias"]] += measure(gradient).sum(0).view_as(totals[use.names["bias"]])
            return
        for name, values in use.per_sample(gradient).items():
            flat = values.flatten(1)
            if name in shared:  # the calls of a layer are one gradient
                summed[name] = summed[name] + flat if name in summed else flat
            else:
                totals[name] += measure(flat).sum(0).view_as(totals[name])

    taps.backward(vectors(taps.logits.detach())[:, 0], receive, last=True)
    for name, flat in summed.items():
        totals[name] += measure(flat).sum(0).view_as(totals[name])


def add_vmapped(
    model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, *, measure: Measure
) -> None:
    vmapped_gradients(model, inputs, vectors, partial(_add, totals, measure))


def add_looped(
    model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, *, measure: Measure
) -> None:
    looped_gradients(model, inputs, vectors, partial(_add, totals, measure))


def _add(totals: Parameters, measure: Measure, gradients: Parameters) -> None:
    """`gradients`: [b, V, ...] each."""
    for name, values in gradients.items():
        totals[name] += measure(values).sum((0, 1))
