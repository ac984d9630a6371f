"""Fishers held in other ways than by their diagonal, and any of them as a whole matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from cl_runner.fisher.curvature import Curvature, Parameters
from cl_runner.fisher.estimators import Estimator
from cl_runner.fisher.representations import Representation
from cl_runner.models.model import Model, PretrainedView
from cl_runner.streams.base import Examples


def held(
    estimator: Estimator, model: Model | PretrainedView, examples: Examples, representation: Representation
) -> Curvature:
    """What `estimator` says, held in that way."""
    return replace(estimator, representation=representation)(model, examples)


def dense(fisher: Curvature, shapes: dict[str, tuple[int, ...]], precision: torch.dtype = torch.float64) -> Tensor:
    """Its matrix over these parameters, by its products with every unit vector."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]

    def column(unit: Tensor) -> Tensor:
        parts = zip(shapes.items(), unit.split(sizes), strict=True)
        delta: Parameters = {name: part.view(shape) for (name, shape), part in parts}
        product = fisher.product(delta)
        return torch.cat([product.get(name, torch.zeros_like(delta[name])).flatten() for name in shapes])

    return torch.stack([column(unit) for unit in torch.eye(sum(sizes), dtype=precision)], 1)
