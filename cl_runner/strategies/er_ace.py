"""Experience replay with asymmetric cross-entropy (Caccia et al., 2022, arXiv 2104.05025, eq. 4)."""

from dataclasses import replace

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Output
from cl_runner.strategies.rehearsal import Rehearsal, weighted
from cl_runner.streams.base import Examples
from cl_runner.streams.recipe import Recipe


class ERACE(Rehearsal):
    """Restrict the loss of fresh rows to the classes in their batch, so that they do not push old classes away.

    Replayed rows compete among all classes. The two mean losses are added. Deviations: fresh rows do not compete with
    classes yet to come either, which the authors' code leaves in, so that a task of a single class would teach nothing;
    and the first task is learned like the others, where that code restricts and replays nothing.
    """

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        sizes = stream.task_sizes or []
        if len(sizes) > 1 and set(sizes) == {1}:
            reason = "a class that is alone in its batches has no loss"
            raise ConfigError("strategy", f"expected tasks of several classes for ERACE ({reason}), got one class each")

    def with_replay(self, batch: Examples) -> Examples:
        every = torch.ones(self.stream.num_classes, dtype=torch.bool, device=batch.labels.device)
        present = torch.zeros_like(every).index_fill(0, batch.labels, True)
        parts = [(_among(batch, present), {"weight": 1.0})]
        if len(self.memory):
            parts.append((_among(self.replay(batch), every), {"weight": 1.0}))
        return weighted(parts)

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        logits = output.logits.masked_fill(~batch.extras["classes"], -torch.inf)
        return (batch.extras["weight"] * self.row_losses(batch, replace(output, logits=logits))).mean()


def _among(rows: Examples, classes: Tensor) -> Examples:
    """The rows, with the classes ([K] bool) that enter their softmax."""
    return replace(rows, extras={"classes": classes.expand(len(rows), -1)})
