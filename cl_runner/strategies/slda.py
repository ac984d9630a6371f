"""Deep streaming linear discriminant analysis (Hayes & Kanan, 2020, arXiv 1909.01520)."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.ranges import Count
from cl_runner.strategies.closed_form import ClosedForm
from cl_runner.strategies.moments import Moments
from cl_runner.streams.base import Stream


class SLDA(ClosedForm):
    """Train nothing: linear discriminant analysis, with the classes' means and a shared covariance.

    score_k(z) = w_k'z + b_k with w_k = L m_k, b_k = -m_k'L m_k / 2 and L = ((1 - e) S + e I)^-1 (the paper's linear
    classifier; m_k the means). S is the exact within-class covariance of all examples so far, which the paper's running
    update approximates; there is no base initialisation.
    """

    saved = ("moments",)

    def __init__(
        self,
        *,
        shrinkage: Annotated[float, Field(ge=0, le=1)] = 1e-4,
        batch_size: Count = 256,
    ) -> None:
        """`shrinkage`: e above."""
        super().__init__(batch_size)
        self.shrinkage = shrinkage

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.moments = Moments(stream.num_classes, model.head.in_features, shared=True, device=self.float64_device)
        self.counts = self.moments.counts  # one tensor, filled in place

    def gather(self, features: Tensor, labels: Tensor) -> None:
        self.moments.add(features, labels)

    def fit(self) -> Callable[[Tensor], Tensor]:
        means, covariance = self.moments.means, self.moments.covariance()
        shrunk = torch.lerp(covariance, torch.eye(len(covariance)).to(covariance), self.shrinkage)
        weight = means @ torch.linalg.pinv(shrunk, hermitian=True)  # [K, D]; fewer examples than D: no inverse at e = 0
        return lambda features: features @ weight.T - (weight * means).sum(1) / 2
