"""RanPAC: random projections and pre-trained models for continual learning (McDonnell et al., 2023, arXiv 2307.02251),
without its first phase: the backbone is not adapted to the first task."""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat
from torch import Tensor

from cl_runner.models.architecture import seeded
from cl_runner.models.model import Model
from cl_runner.ranges import Count
from cl_runner.strategies.closed_form import ClosedForm
from cl_runner.strategies.ridge import best_ridge
from cl_runner.streams.base import Stream


class RanPAC(ClosedForm):
    """Train nothing: ridge regression of the labels on a random non-linear projection of the features.

    h(x) = relu(f(x) P) with P normal [D, M]; scores h(x) (G + l I)^-1 C, where G = sum h'h and C = sum h'y over all
    examples so far (phase 2 of algorithm 1). l minimises the squared error on 20 % of the last task's examples, with
    weights fitted to the others.
    """

    saved = ("counts", "gram", "sums", "ridge")

    def __init__(
        self,
        *,
        projection: Count | None = 10_000,
        ridge: PositiveFloat | None = None,
        batch_size: Count = 256,
    ) -> None:
        """`projection`: M, or null for the features themselves; the statistics take 8 M^2 bytes, and solving for the
        weights three times as much again; `ridge`: l, or null to select it, which takes 16 N M bytes and three float64
        matrices of min(0.8 N, M)^2 elements in a task of N examples."""
        super().__init__(batch_size)
        self.size, self.fixed_ridge = projection, ridge

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        features = model.head.in_features
        size = self.size or features
        if self.size is not None:
            with seeded(model.seed):  # on the CPU: the same on every device, and after a resume
                self.projection = torch.randn(features, size).to(self.float64_device).double()
        self.gram, self.sums = self.zeros(size, size), self.zeros(size, stream.num_classes)
        self.ridge = self.fixed_ridge or 1.0

    def gather(self, features: Tensor, labels: Tensor) -> None:
        targets = torch.eye(len(self.counts)).to(features)[labels]  # [N, K]
        if self.fixed_ridge is None and len(features) > 1:
            self.ridge = best_ridge(self.projected(features), targets)
        for rows, marks in zip(features.split(self.batch_size), targets.split(self.batch_size), strict=True):
            projected = self.projected(rows)
            self.gram.addmm_(projected.T, projected)
            self.sums.addmm_(projected.T, marks)
        self.counts += targets.sum(0)

    def fit(self) -> Callable[[Tensor], Tensor]:
        regularised = self.gram + self.ridge * torch.eye(len(self.gram)).to(self.gram)
        weight = torch.linalg.solve(regularised, self.sums)  # [M, K]
        return lambda features: self.projected(features) @ weight

    def projected(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, M]."""
        return features if self.size is None else (features @ self.projection).relu()

    def report(self) -> dict[str, float | None]:
        return {"ranpac_ridge": self.ridge}
