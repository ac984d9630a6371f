"""Squared gradients of batches' mean losses: what much code calls the empirical Fisher, with its variants."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.engine import wide
from cl_runner.fisher.estimators import Estimator, unit
from cl_runner.models.model import Classifier, trainable
from cl_runner.models.substitute import nothing_kept
from cl_runner.randomness import random_state, restore_random_state
from cl_runner.ranges import Count
from cl_runner.streams.base import Examples


@dataclass(kw_only=True)
class Batched(Estimator):
    """The squared gradient of a batch's mean loss, averaged over batches.

    Too small by about a factor of the batch size, which is part of its definition; only to reproduce papers. A short
    last batch counts as much as any other, as in that code.

    Args:
        train_mode: normalise by each batch's own statistics (except in layers that the model keeps in eval mode), with
            dropout active. A last batch of one, which has no statistics, then joins the one before it.
        augment: augment images as in training (`stream.augment`).
        clip: the largest value, None for no bound; 1e-4 in PyCIL (`fishermax`).
        reverse: take the loss of the reversed logits, as the code of "EWC done right" does (arXiv 2603.18596).

    All randomness follows from the seed.
    """

    batch_size: Count = 128
    train_mode: bool = False
    augment: bool = False
    clip: PositiveFloat | None = None
    reverse: bool = False

    needs_labels = True
    representations = ("diagonal",)
    precisions = ("fp32",)

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        super().__post_init__()
        for field, value in (("batch_size", self.batch_size), ("num_samples", self.num_samples)):
            if self.train_mode and value == 1:
                message = "expected at least 2 with train_mode (one image has no statistics to normalise by), got 1"
                raise ConfigError(f"fisher.{field}", message)

    def check(self, model: Classifier, image_shape: tuple[int, ...]) -> None:
        """Accept any model: no per-sample gradients are needed."""

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        turned = torch.where(logits == -torch.inf, logits, -logits) if self.reverse else logits
        p = turned.softmax(1)[:, None]  # the gradient up to its sign, which squaring removes
        return (unit(labels[:, None], p) - p) / len(logits)

    def _mean(self, model: Classifier, prepared: Examples, generator: torch.Generator) -> tuple[Diagonal, int]:
        model.train(self.train_mode)
        model.preprocess.train(self.augment)
        parameters = trainable(model)
        squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        batches = list(self._in_batches(prepared))
        with _own_generators(self.seed_for(prepared), model.device):
            for batch in batches:
                gradients = self._gradients(model, list(parameters.values()), batch.to(model.device))
                for total, gradient in zip(squares.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
        most = math.inf if self.clip is None else self.clip
        values = {name: (total / len(batches)).clamp(max=most) for name, total in squares.items()}
        return Diagonal(values), len(prepared)

    def _in_batches(self, examples: Examples) -> Iterator[Examples]:
        alone = self.train_mode and len(examples) > 1 and len(examples) % self.batch_size == 1
        last = len(examples) - self.batch_size - 1 if alone else len(examples)
        yield from examples[:last].batches(self.batch_size)
        if alone:
            yield examples[last:]

    def _gradients(self, model: Classifier, parameters: list[Tensor], batch: Examples) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), nothing_kept(model):
            logits = model(batch.images).logits
        entering = wide(self._entering(model, logits.detach(), batch))
        vectors = self.vectors(entering, batch.labels, torch.empty(0)).to(logits)
        return torch.autograd.grad(logits, parameters, vectors[:, 0], allow_unused=True) if parameters else ()


@contextmanager
def _own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators for the block, and restore them afterwards."""
    outside = random_state(device)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            torch.get_device_module(device).manual_seed(seed)
    try:
        yield
    finally:
        restore_random_state(outside, device)
