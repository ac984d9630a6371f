"""Base class of methods with a memory: when rows are stored, and how stored rows join a batch."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.memory.base import Memory
from cl_runner.models.model import Model, Output, trainable
from cl_runner.ranges import Count
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import evaluating, features_of
from cl_runner.streams.base import Examples, Stream, Task, concatenate

Store = Literal["step", "task"]


class Rehearsal(Strategy):
    """Train on each batch together with one drawn from memory, all rows weighted equally."""

    saved = ("memory",)

    def __init__(self, *, memory: Memory, replay_batch_size: Count | None = None, store: Store = "step") -> None:
        """`replay_batch_size`: null for as many rows as are fresh; `store`: offer the memory each batch after its step
        (again in each epoch, so that a row may be held twice), or each task at its end."""
        if store == "step" and not memory.streaming:
            kind = type(memory).__name__
            raise ConfigError("strategy.memory", f"expected one that takes single batches (store=step), got {kind}")
        self.memory, self.replay_batch_size = memory, replay_batch_size
        self.store: Store = store

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.memory.warn_of_lack(stream)

    def before_batch(self, batch: Examples) -> Examples:
        self.fresh = len(batch)
        return self.with_replay(batch)

    def with_replay(self, batch: Examples) -> Examples:
        """The batch to train on: the fresh rows of `batch`, then any replayed ones."""
        return batch + self.replay(batch) if len(self.memory) else batch

    def replay(self, batch: Examples) -> Examples:
        """Rows drawn from a memory that is not empty, to replay with this fresh batch."""
        return self.memory.sample(self.replay_batch_size or len(batch)).to(batch.labels.device)

    def to_store(self, fresh: Examples, output: Output) -> Examples:
        """What to offer the memory after a step; `output`: of the fresh rows and the replayed ones."""
        return replace(fresh, extras={})

    def after_step(self, batch: Examples, output: Output) -> None:
        if self.store == "step":
            self.memory.add(self.to_store(batch[: self.fresh], output))

    def after_task(self, task: Task) -> None:
        if self.store == "task":
            self.memory.add_task(task.train, features_of(self.model))

    def row_losses(self, batch: Examples, output: Output) -> Tensor:
        """Cross-entropy of each row, [B], over the outputs visible to its task."""
        return F.cross_entropy(self.model.restrict(output.logits, batch.task_ids), batch.labels, reduction="none")

    def gradient(self, examples: Examples) -> list[Tensor]:
        """The gradient of the mean loss on these examples, for each of `learning`; their `.grad` is left alone.

        They are passed in pieces no larger than the fresh batch, and a single row in eval mode: a normalisation layer
        cannot compute statistics of it.
        """
        learning, pieces = self.learning, math.ceil(len(examples) / self.fresh)
        totals: list[Tensor] = []
        for piece in examples.split(pieces):
            with evaluating(self.model) if len(piece) == 1 else nullcontext():
                losses = self.row_losses(piece, self.model(piece.images))
            loss = losses.mean() * (len(piece) / len(examples))
            found = torch.autograd.grad(loss, learning, allow_unused=True, materialize_grads=True)
            totals = [total + part for total, part in zip(totals, found, strict=True)] if totals else list(found)
        return totals

    @property
    def learning(self) -> list[Tensor]:
        """The trainable parameters."""
        return list(trainable(self.model).values())


def weighted(parts: Sequence[tuple[Examples, dict[str, float]]]) -> Examples:
    """All rows in order, with an extra [B] for each of the named weights.

    The mean over rows of extra * loss is then the sum over parts of weight * the part's mean loss, even if gradients
    are accumulated over micro-batches.
    """
    total = sum(len(part) for part, _ in parts)

    def marked(part: Examples, weights: dict[str, float]) -> Examples:
        ones = torch.ones(len(part), device=part.labels.device)
        return replace(part, extras=part.extras | {name: w * total / len(part) * ones for name, w in weights.items()})

    return concatenate([marked(part, weights) for part, weights in parts])
