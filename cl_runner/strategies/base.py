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

    `saved` names the attributes that a run needs to go on from between any two steps, in a process that has called
    `setup` and neither `before_task` nor `before_batch`: all that any later hook sets, unless it is set anew before it
    is read again. They are numbers, strings, tensors and containers of these; things with a `state_dict` (modules,
    memories) and generators (`torch.Generator`), which `setup` or the constructor makes, are saved by their state; a
    class of one's own is let in by `torch.serialization.add_safe_globals`. The model, which of its parameters learn,
    its modules' modes and the global random generators are the runner's to save. What `training_data` gives must
    follow from the task, what is saved and the random state that it finds.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    scenarios: ClassVar[frozenset[Scenario]] = frozenset(Scenario)  # where the method can work
    needs_task_id: ClassVar[bool] = False  # predicts only where the task is told
    offline: ClassVar[bool] = False  # learns all the tasks in one go once the last has come
    active_logits: ClassVar[ActiveLogits | None] = None  # where trainer.active_logits is null; None: the scenario's
    rewires: ClassVar[bool] = False  # changes in `setup` what the model is made of
    for_pretrained: ClassVar[bool] = False  # builds on features that the backbone brings: random ones are said so

    # What `Combined` must know of its parts: which go together, and whose hooks come first.
    closed_form: ClassVar[bool] = False  # trains nothing, answers from statistics of the features
    extends_backbone: ClassVar[bool] = False  # puts prompts or branches of its own into the backbone
    redraws: ClassVar[bool] = False  # draws some of these anew for each task
    carries_over: ClassVar[bool] = False  # what these have learned in earlier tasks goes into later ones
    restarts: ClassVar[bool] = False  # takes the backbone back to its first weights before each task
    caches_features: ClassVar[bool] = False  # computes the backbone's features once
    holds_earlier_weights: ClassVar[bool] = False  # pulls weights to where an earlier task left them
    keeps_all_data: ClassVar[bool] = False  # learns earlier tasks' data again, without a `memory`
    excludes_replay: ClassVar[bool] = False  # takes every row that it learns for one of the current task
    has_teacher: ClassVar[bool] = False  # copies the model in `setup`, and its state in `before_task`
    realigns_head: ClassVar[bool] = False  # answers with another head in between tasks, undone in `before_task`
    measures_steps: ClassVar[bool] = False  # looks in `after_step` at how far the step has moved the weights

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

    def state_dict(self) -> dict[str, Any]:
        """What `saved` names: by its own `state_dict` what has one, a generator by its state, all else as it is."""
        return {name: _state_of(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back what `state_dict` gave, after `setup`."""
        for name, value in state.items():
            current = getattr(self, name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(value)
            elif isinstance(current, torch.Generator):
                current.set_state(value.cpu())
            else:
                setattr(self, name, value)

    def report(self) -> dict[str, float | None]:
        """Numbers about what the method has computed so far, by name; they join the run's metrics, and seconds its
        seconds."""
        return {}

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """Scores [B, K] of every class, unmasked: the evaluation masks them, once a scenario."""
        return self.model(images).logits


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def _in_short(kind: type) -> str:
    """The first clause of its docstring."""
    return re.split(r"[.;:]\s", f"{' '.join((kind.__doc__ or '').split())} ")[0].lower()
