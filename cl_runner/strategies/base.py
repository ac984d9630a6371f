"""The hooks that make a method. The base class is plain fine-tuning; a method overrides the few that it needs."""

import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import ActiveLogits, Model, Output
from cl_runner.streams.base import Examples, Scenario, Stream, Task
from cl_runner.streams.recipe import Recipe


class Strategy:
    """Plain fine-tuning: learn each task as it comes.

    `saved` names the attributes that a run needs to resume between any two steps, in a process that has called `setup`
    but neither `before_task` nor `before_batch`: everything that later hooks set and do not set again before reading
    it. They are numbers, strings, tensors and containers of these. Objects with a `state_dict` (modules, memories) and
    generators (`torch.Generator`), created by `setup` or the constructor, are saved by their state; classes of your own
    must be allowed by `torch.serialization.add_safe_globals`. The runner itself saves the model, which of its
    parameters are trainable, its modules' modes and the global random generators. What `training_data` returns must be
    determined by the task, the saved attributes and the random state.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    scenarios: ClassVar[frozenset[Scenario]] = frozenset(Scenario)  # in which the method works
    needs_task_id: ClassVar[bool] = False  # cannot predict without the task's id
    offline: ClassVar[bool] = False  # learns all tasks at once, when the last has arrived
    active_logits: ClassVar[ActiveLogits | None] = None  # if trainer.active_logits is null; None: the scenario's
    rewires: ClassVar[bool] = False  # changes the model's structure in `setup`
    for_pretrained: ClassVar[bool] = False  # relies on pretrained features: a run without them is warned
    closed_form: ClassVar[bool] = False  # trains nothing: predicts from statistics of the features
    extends_backbone: ClassVar[bool] = False  # adds prompts or branches to the backbone
    redraws: ClassVar[bool] = False  # reinitialises some of its prompts or branches for each task
    restarts: ClassVar[bool] = False  # resets the backbone to its initial weights in `before_task`
    caches_features: ClassVar[bool] = False  # computes the backbone's features once

    # What `Combined` alone must know of its parts: which go together, and whose hooks come first.
    carries_over: ClassVar[bool] = False  # its prompts build on what they learned in earlier tasks
    holds_earlier_weights: ClassVar[bool] = False  # pulls weights towards those after an earlier task
    keeps_all_data: ClassVar[bool] = False  # trains on earlier tasks' data again, without a `memory`
    excludes_replay: ClassVar[bool] = False  # assumes that all training rows are of the current task
    has_teacher: ClassVar[bool] = False  # copies the model in `setup`, and its state in `before_task`
    realigns_head: ClassVar[bool] = False  # predicts with another head between tasks; `before_task` undoes it
    # `after_backward` notes the gradient, before others edit it; `after_step` how far the whole step moved the weights
    measures_steps: ClassVar[bool] = False

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
                f"({_in_short(type(self))}), got {stream.scenario}",
            )

    def setup(self, model: Model, stream: Stream) -> None:
        """Called once, before all else and before a checkpoint is loaded: add a head, adapters, a teacher."""
        self.model, self.stream = model, stream

    def before_task(self, task: Task) -> None:
        """Called when the task's outputs have been revealed, but nothing of it has been learned."""

    def training_data(self, task: Task) -> Examples:
        """The examples to train on in this task; may be empty. Must not have side effects."""
        return task.train

    def before_batch(self, batch: Examples) -> Examples:
        """The batch to train on; replayed rows come after the fresh ones."""
        return batch

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        """Cross-entropy over the outputs visible to each example's task, a scalar."""
        return F.cross_entropy(self.model.restrict(output.logits, batch.task_ids), batch.labels)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        """Scalars by name, each added to the loss and logged."""
        return {}

    def after_backward(self) -> None:
        """Called before the gradients are clipped: read or edit them."""

    def after_step(self, batch: Examples, output: Output) -> None:
        """Called after the optimizer's step; `output` is from before it."""

    def after_task(self, task: Task) -> None:
        """Called when the task has been learned: consolidate."""

    def state_dict(self) -> dict[str, Any]:
        """The `saved` attributes: objects that have a `state_dict` as that, generators as their state, others as they
        are."""
        return {name: _state_of(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called after `setup`."""
        for name, value in state.items():
            current = getattr(self, name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(value)
            elif isinstance(current, torch.Generator):
                current.set_state(value.cpu())
            else:
                setattr(self, name, value)

    def report(self) -> dict[str, float | None]:
        """Numbers about the method's computations so far, by name: those named `…_seconds` join the run's timings, the
        others its metrics."""
        return {}

    @property
    def predicts_by_weights(self) -> bool:
        """Whether a finished run's file of weights holds all that `predict` depends on."""
        plain = type(self).predict is Strategy.predict or not self.saved
        return plain and not (self.rewires or self.extends_backbone)

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """Scores [B, K] of every class, unmasked: the evaluation masks them for each scenario."""
        return self.model(images).logits


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def _in_short(kind: type) -> str:
    """The first clause of the class's docstring, without what it has in brackets."""
    words = " ".join(re.sub(r"\s*\([^()]*\)", "", kind.__doc__ or "").split())
    return re.split(r"[.;:]\s", f"{words} ")[0].lower()
