"""Inference with the model, which leaves its weights and statistics as they were."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from cl_runner.memory.base import Features
from cl_runner.models.model import Model
from cl_runner.models.substitute import call_with
from cl_runner.streams.base import Examples

CHUNK = 256  # images per forward pass, unless told otherwise


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Put the model in eval mode inside: no statistics move, nothing is dropped out or augmented."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def features_of(model: Model) -> Features:
    """The function images -> features [B, D]: in eval mode, without gradients, and leaving the model as it was."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with evaluating(model):
            return model(images.to(model.device)).features

    return features


def float64_device(device: torch.device) -> torch.device:
    """Where to keep statistics and compute them in float64: `device`, if it supports that."""
    return torch.device("cpu") if device.type == "mps" else device


@torch.no_grad()
def extract_features(
    model: Model, examples: Examples, batch_size: int, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Features [N, D] (float64) and labels [N] of all examples, on `float64_device`, without augmentation.

    `weights`: by name, to use instead of the model's own. Leaves the model in eval mode.
    """
    model.eval()
    parts = list(examples.batches(batch_size))
    features = [call_with(model, weights or {}, part.images.to(model.device)).features for part in parts]
    place = float64_device(model.device)
    return torch.cat(features).to(place).double(), torch.cat([part.labels for part in parts]).to(place)


def cloned_state(model: Model, *prefixes: str) -> dict[str, Tensor]:
    """Copies of the parameters and buffers whose names start with one of the prefixes."""
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefixes)}


def predict_by_task(
    model: Model, images: Tensor, task_ids: Tensor, learned: Mapping[int, dict[str, Tensor]], other: dict[str, Tensor]
) -> Tensor:
    """Logits [B, K], float32, of each image under the weights `learned` for its task, or else the `other` weights."""
    scores = images.new_zeros(len(images), model.head.out_features, dtype=torch.float32)
    for task in task_ids.unique().tolist():
        rows = task_ids == task
        scores[rows] = call_with(model, learned.get(task, other), images[rows]).logits.float()
    return scores


class FeatureCache:
    """The features of test images under a backbone that never changes, computed once and kept (4 D bytes each) as long
    as there is room.

    Batches are identified by their content.
    """

    def __init__(self, model: Model, room: int = 2**30) -> None:
        """`room`: bytes. Test sets fit; a model that predicts for users sees ever new images."""
        self.model, self.room = model, room
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        key = blake2b(images.cpu().numpy().tobytes(), digest_size=16).digest()
        if key in self.known:
            return self.known[key]
        features = self.model(images).features
        if features.nbytes <= self.room:
            self.room -= features.nbytes
            self.known[key] = features
        return features
