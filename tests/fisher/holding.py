"""Fishers in a chosen representation, and any of them as a dense matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from cl_runner.fisher.curvature import Curvature
from cl_runner.fisher.estimators import Estimator
from cl_runner.fisher.representations import Representation
from cl_runner.models.model import Classifier, Parameters
from cl_runner.streams.base import Examples


def held(estimator: Estimator, model: Classifier, examples: Examples, representation: Representation) -> Curvature:
    """The result of `estimator` in this representation."""
    return replace(estimator, representation=representation)(model, examples)


def dense(fisher: Curvature, shapes: dict[str, tuple[int, ...]], precision: torch.dtype = torch.float64) -> Tensor:
    """The matrix of `fisher` over these parameters, from its products with every unit vector."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]

    def column(unit: Tensor) -> Tensor:
        parts = zip(shapes.items(), unit.split(sizes), strict=True)
        delta: Parameters = {name: part.view(shape) for (name, shape), part in parts}
        product = fisher.product(delta)
        return torch.cat([product.get(name, torch.zeros_like(delta[name])).flatten() for name in shapes])

    return torch.stack([column(unit) for unit in torch.eye(sum(sizes), dtype=precision)], 1)
