"""The hooks that make a method. The base class is plain fine-tuning; a method overrides the few that it needs."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model, Output
from cl_runner.streams.base import Examples, Scenario, Stream, Task
from cl_runner.streams.recipe import Recipe


class Strategy:
    """Plain fine-tuning: learn each task as it comes."""

    saved: ClassVar[tuple[str, ...]] = ()  # attributes that a resumed run needs: tensors, containers of them, modules
    scenarios: ClassVar[frozenset[Scenario]] = frozenset(Scenario)  # where the method can work
    needs_task_id: ClassVar[bool] = False  # predicts only where the task is told
    offline: ClassVar[bool] = False  # learns all the tasks in one go once the last has come

    model: Model
    stream: Stream

    def check(self, stream: Recipe, model: Architecture) -> None:
        """Refuse, before any data is loaded, what the method cannot work with.

        Raises ConfigError, with the reason.
        """
        if stream.scenario not in self.scenarios:
            raise ConfigError(
                "strategy",
                f"expected stream.scenario={' or '.join(sorted(self.scenarios))} for {type(self).__name__} "
                f"({_first_line(type(self))}), got {stream.scenario}",
            )

    def setup(self, model: Model, stream: Stream) -> None:
        """Once, before anything else and before a checkpoint is loaded: add a head, adapters, a teacher."""
        self.model, self.stream = model, stream

    def before_task(self, task: Task) -> None:
        """The task's outputs are revealed; nothing of it is learned."""

    def training_data(self, task: Task) -> Examples:
        """What is learned in this task: free of side effects; may be empty."""
        return task.train

    def before_batch(self, batch: Examples) -> Examples:
        """The batch to learn: memories join after the fresh rows."""
        return batch

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        """Cross-entropy over the outputs that each example's task may see, a scalar."""
        return F.cross_entropy(self.model.restrict(output.logits, batch.task_ids), batch.labels)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        """Scalars by name, each added to the loss and logged."""
        return {}

    def after_backward(self) -> None:
        """The gradients are there, not yet clipped: read or edit them."""

    def after_step(self, batch: Examples, output: Output) -> None:
        """The optimizer has stepped; `output` is from before it did."""

    def after_task(self, task: Task) -> None:
        """The task is learned: consolidate."""

    def report(self) -> dict[str, float | None]:
        """Numbers about what the method has computed so far, by name; they join the run's metrics, and seconds its
        seconds."""
        return {}

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """Scores [B, K] of every class, unmasked: the evaluation masks them, once a scenario."""
        return self.model(images).logits


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".").lower()
