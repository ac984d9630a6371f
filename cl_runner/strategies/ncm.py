"""Nearest class mean (Mensink et al., 2013; with cosine: SimpleCIL, Zhou et al., 2024, arXiv 2303.07338)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.ranges import Count
from cl_runner.strategies.closed_form import ClosedForm
from cl_runner.streams.base import Stream


class NCM(ClosedForm):
    """Train nothing: predict the class with the nearest mean of the initial features, argmin_k d(f(x), m_k).

    Mensink et al. also learn the metric d, which is the cosine's (SimpleCIL) or Euclid's here.
    """

    saved = ("sums", "counts")

    def __init__(self, *, distance: Literal["cosine", "euclidean"] = "cosine", batch_size: Count = 256) -> None:
        super().__init__(batch_size)
        self.distance = distance

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.sums = self.zeros(stream.num_classes, model.head.in_features)  # [K, D]

    def gather(self, features: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, features)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def fit(self) -> Callable[[Tensor], Tensor]:
        means = self.sums / self.counts.clamp(min=1)[:, None]
        if self.distance == "cosine":
            return lambda features: F.normalize(features) @ F.normalize(means).T
        return lambda features: -torch.cdist(features, means)
