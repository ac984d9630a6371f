"""Methods that train nothing: statistics of the initial features, and a classifier in closed form."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import FeatureCache, extract_features, float64_device
from cl_runner.streams.base import Examples, Stream, Task


class ClosedForm(Strategy):
    """Accumulate statistics of each class's features, without augmentation, and classify by them.

    Each image, of training or test data, passes through the backbone once. A finished run's file of weights holds the
    unchanged backbone, and none of the statistics.
    """

    for_pretrained = True
    closed_form = True

    counts: Tensor  # [K] float64: examples of each class

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    @abstractmethod
    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Add a task's features [N, D] (float64) and labels [N] to the statistics; classes may recur."""

    @abstractmethod
    def fit(self) -> Callable[[Tensor], Tensor]:
        """The function features [B, D] (float64) -> scores [B, K] that follows from the statistics so far."""

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        model.requires_grad_(False)
        self.float64_device = float64_device(model.device)
        self.counts = self.zeros(stream.num_classes)
        self.classifier: Callable[[Tensor], Tensor] | None = None  # derived from the statistics: not saved
        self.cached_features = FeatureCache(model)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.float64_device)

    def training_data(self, task: Task) -> Examples:
        return task.train[:0]

    def after_task(self, task: Task) -> None:
        self.gather(*extract_features(self.model, task.train, self.batch_size))
        self.classifier = None

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        if not self.counts.any():  # nothing to fit yet, which may take long for nothing
            return torch.full((len(images), len(self.counts)), -torch.inf, device=images.device)
        self.classifier = self.classifier or self.fit()
        scores = self.classifier(self.cached_features(images).to(self.float64_device).double())
        return scores.masked_fill(self.counts == 0, -torch.inf).to(images.device, torch.float32)
