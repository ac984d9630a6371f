"""Linear probe: what the pretrained features reach unchanged."""

from dataclasses import replace

import torch
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import CHUNK, FeatureCache, features_of
from cl_runner.streams.base import Examples, Stream, Task


class Frozen(Strategy):
    """Train the head alone; the backbone stays in eval mode, with fixed statistics and no dropout.

    Each image passes through the backbone only once, however many epochs there are, unless images are augmented.
    """

    for_pretrained = True
    caches_features = True

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        model.backbone.requires_grad_(False)
        model.keep_in_eval(model.backbone.modules())
        self.cached_features = FeatureCache(model)

    def training_data(self, task: Task) -> Examples:
        data = task.train
        if self.stream.augment or not len(data):
            return data
        features = torch.cat([features_of(self.model)(part.images) for part in data.batches(CHUNK)])
        return replace(data, extras={"features": features.to(data.labels.device)})

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return self.model.head(self.cached_features(images))
