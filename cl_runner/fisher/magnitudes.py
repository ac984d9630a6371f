"""Mean magnitudes of per-sample gradients, where a Fisher takes their squares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.engine import MeasuredGradients
from cl_runner.fisher.estimators import Estimator
from cl_runner.fisher.representations import Accumulator
from cl_runner.gradients.fallbacks import Measure, even_slices
from cl_runner.gradients.layers import Linear, Use
from cl_runner.gradients.passes import Vectors, shared_parameters
from cl_runner.gradients.products import ROOM
from cl_runner.gradients.taps import Taps
from cl_runner.models.model import Classifier, Parameters


@dataclass(kw_only=True)
class Magnitudes(Estimator):
    """How much each weight moves the outputs: the mean of |∂‖z‖²/∂θ| over samples, z the active logits (Aljundi et al.,
    2018, https://arxiv.org/abs/1711.09601, eq. 2 and 3). Not a Fisher.

    The mean is over each sample's own magnitude; the magnitude of a batch's mean gradient, which much code takes, would
    shrink as the batch grows.
    """

    representations = ("diagonal",)
    precisions = ("fp32",)

    @property
    def called(self) -> str:
        return "strategy=mas"

    def check(self, model: Classifier, image_shape: tuple[int, ...]) -> None:
        """As `Estimator.check`, but without advice on the choice of a Fisher, since there is none."""
        try:
            self._try_out(model, image_shape)
        except ValueError as error:
            raise ConfigError("strategy", str(error)) from error

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        return 2 * logits.masked_fill(logits == -torch.inf, 0)[:, None]

    def accumulators(self, model: Classifier) -> Iterator[Accumulator]:
        yield AbsoluteGradients(model)


class AbsoluteGradients(MeasuredGradients):
    """The running sum over samples of |vᵀ ∂z/∂θ|."""

    def __init__(self, model: Classifier) -> None:
        super().__init__(model, add_tapped)

    def options(self, way: Callable[..., None]) -> dict[str, Any]:
        return {"measure": torch.abs}

    def slices(self, length: int, passes: int) -> Iterator[slice]:
        largest = max(values.numel() for values in self._parameters.values())
        return even_slices(length, max(1, ROOM // largest))


def add_tapped(
    model: Classifier,
    totals: Parameters,
    inputs: Tensor,
    vectors: Vectors,
    measure: Measure = torch.square,
) -> None:
    """Add Σ measure(vᵀ ∂z/∂θ), summed over `inputs` [B, ...], to `totals` in place; `vectors`: logits -> [B, 1, K]."""
    taps = Taps(model, inputs)
    shared, summed = shared_parameters(taps), {}

    def receive(use: Use, gradient: Tensor) -> None:
        if isinstance(use, Linear) and use.inputs.dim() == 2 and shared.isdisjoint(use.names.values()):
            # The magnitudes of an outer product are products of magnitudes: no per-sample gradient is ever formed.
            if "weight" in use.names:
                total = totals[use.names["weight"]]
                total += (measure(gradient).T @ measure(use.inputs)).view_as(total)
            if "bias" in use.names:
                totals[use.names["bias"]] += measure(gradient).sum(0).view_as(totals[use.names["bias"]])
            return
        for name, values in use.per_sample(gradient).items():
            flat = values.flatten(1)
            if name in shared:  # its calls add up to one gradient
                summed[name] = summed[name] + flat if name in summed else flat
            else:
                totals[name] += measure(flat).sum(0).view_as(totals[name])

    taps.backward(vectors(taps.logits.detach())[:, 0], receive, last=True)
    for name, flat in summed.items():
        totals[name] += measure(flat).sum(0).view_as(totals[name])
