"""Nearest class mean (Mensink et al., 2013; with cosine: SimpleCIL, Zhou et al., 2024, arXiv 2303.07338)."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task


class NCM(Strategy):
    """Train nothing: name the class whose mean feature, under the model as it came, is nearest."""

    saved = ("sums", "counts")

    def __init__(
        self, *, distance: Literal["cosine", "euclidean"] = "cosine", batch_size: Annotated[int, Field(ge=1)] = 256
    ) -> None:
        self.distance, self.batch_size = distance, batch_size

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        model.requires_grad_(False)
        self.sums = torch.zeros(stream.num_classes, model.head.in_features, device=model.device)  # [K, D]
        self.counts = torch.zeros(stream.num_classes, device=model.device)  # [K]

    def training_data(self, task: Task) -> Examples:
        return task.train[:0]

    @torch.no_grad()
    def after_task(self, task: Task) -> None:
        self.model.eval()
        for batch in task.train.batches(self.batch_size):
            batch = batch.to(self.model.device)
            self.sums.index_add_(0, batch.labels, self.model(batch.images).features)
            self.counts.index_add_(0, batch.labels, torch.ones_like(batch.labels, dtype=self.counts.dtype))

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        features = self.model(images).features  # [B, D]
        means = self.sums / self.counts.clamp(min=1)[:, None]
        if self.distance == "cosine":
            scores = F.normalize(features) @ F.normalize(means).T
        else:
            scores = -torch.cdist(features, means)
        return scores.masked_fill(self.counts == 0, -torch.inf)
