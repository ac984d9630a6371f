"""Several methods at once: any penalties, and a memory."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import ActiveLogits, Model, Output
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task
from cl_runner.streams.recipe import Recipe

log = logging.getLogger("cl_runner")

# Hooks of which only one part's is used: the first that differs from plain fine-tuning.
SINGLE = {"training_data": "training data", "task_loss": "loss on the labels", "predict": "predictions"}

# hook -> the traits of the parts whose turn comes first, and of those whose turn comes last, in order.
TURNS: dict[str, tuple[list[str], list[str]]] = {
    "setup": (["rewires"], ["has_teacher"]),  # a teacher copies the model as the others have changed it
    # The head to continue from is restored; teachers copy the model, before it starts afresh or its branches do; and
    # the others see the weights that the task begins with.
    "before_task": (["realigns_head", "has_teacher", "restarts"], []),
    "after_backward": (["measures_steps"], []),  # they want the gradient of the loss, before others edit it
    "after_step": ([], ["measures_steps"]),  # others may shorten the step, or undo some of it
    "after_task": ([], ["realigns_head"]),  # the others must see the head that the next task continues from
}


def _of_any(trait: str) -> Any:
    """A property: whether any part has the trait."""
    return property(lambda combined: any(getattr(part, trait) for part in combined.parts.values()))


class Combined(Strategy):
    """Do what each of the parts does, in their order or in that of TURNS: penalties add up, edits of gradients follow
    one another.

    Replayed rows join a batch last, and the loss is that of the part with the memory: only it knows their weights.
    """

    # What the runner must know of a method holds if it does of a part.
    for_pretrained = _of_any("for_pretrained")
    extends_backbone = _of_any("extends_backbone")
    caches_features = _of_any("caches_features")
    restarts = _of_any("restarts")
    redraws = _of_any("redraws")

    def __init__(self, *, parts: dict[str, Strategy]) -> None:
        """`parts`: name -> method. Training data, the loss on the labels and predictions come from the first part that
        defines its own, where one with a memory precedes all others."""
        if not parts:
            raise ConfigError("strategy.parts", "expected at least one method, got none")
        self.parts = parts

    def check(self, stream: Recipe, model: Architecture) -> None:
        for part in self.parts.values():
            part.check(stream, model)
        if nested := self._those(lambda part: isinstance(part, Combined)):
            raise ConfigError("strategy.parts", f"expected methods that are not combined themselves, got {nested[0]}")
        if alone := self._those(lambda part: part.offline or part.needs_task_id):
            raise ConfigError("strategy.parts", f"expected methods that learn one model task by task, got {alone[0]}")
        if closed_form := self._those(lambda part: part.closed_form):
            raise ConfigError("strategy.parts", f"expected methods that learn by gradients, got {closed_form[0]}")
        self._check_backbone()
        self._check_replay()

    def _check_backbone(self) -> None:
        """Refuse parts whose changes to the backbone conflict."""
        inside = self._those(lambda part: part.extends_backbone)
        if len(inside) > 1:
            got = ", ".join(inside)
            raise ConfigError("strategy.parts", f"expected one method with prompts or branches, got {got}")
        carrying = self._those(lambda part: part.carries_over)
        if carrying and (restarting := self._those(lambda part: part.restarts)):
            # Prompts would keep what earlier tasks have taught them.
            got = f"beside {carrying[0]}, got {restarting[0]}"
            raise ConfigError("strategy.parts", f"expected none that starts afresh {got}")
        if inside and (caching := self._those(lambda part: part.caches_features)):
            # The features would be computed without what is added to the backbone.
            raise ConfigError("strategy.parts", f"expected no frozen backbone beside {inside[0]}, got {caching[0]}")
        redrawn = self._those(lambda part: part.redraws)
        if redrawn and (holding := self._those(lambda part: part.holds_earlier_weights)):
            raise ConfigError(
                "strategy.parts",
                f"expected none that holds earlier weights beside {redrawn[0]}, which redraws its own in each task, "
                f"got {holding[0]}",
            )

    def _check_replay(self) -> None:
        """Refuse parts that would mistake another's replayed rows for fresh ones."""
        with_memory = self._those(lambda part: hasattr(part, "memory"))
        if len(with_memory) > 1:
            raise ConfigError("strategy.parts", f"expected one method with a memory, got {', '.join(with_memory)}")
        replaying = [*with_memory, *self._those(lambda part: part.keeps_all_data)]
        if replaying and (excluding := self._those(lambda part: part.excludes_replay)):
            raise ConfigError("strategy.parts", f"expected no replay beside {excluding[0]}, got {replaying[0]}")

    @property
    def predicts_by_weights(self) -> bool:
        return all(part.predicts_by_weights for part in self.parts.values())

    @property
    def active_logits(self) -> ActiveLogits | None:
        """Those of the part with the memory, as its loss is used: replayed rows tell classes of different tasks apart,
        unlike those of a single task. Without one, those of the first part that has its own."""
        parts = [part for _, part in self._by_memory]
        replaying = [part for part in parts if hasattr(part, "memory") or part.keeps_all_data]
        return next((part.active_logits for part in replaying or parts if part.active_logits), None)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        for hook, what in SINGLE.items():
            names = [name for name, part in self._by_memory if _own(part, hook)]
            if len(names) > 1:
                log.warning("combined: %s taken from %s alone, not from %s", what, names[0], ", ".join(names[1:]))
        for part in self._in_turn("setup"):
            part.setup(model, stream)

    def before_task(self, task: Task) -> None:
        for part in self._in_turn("before_task"):
            part.before_task(task)

    def training_data(self, task: Task) -> Examples:
        return self._first("training_data").training_data(task)

    def before_batch(self, batch: Examples) -> Examples:
        for _, part in reversed(self._by_memory):
            batch = part.before_batch(batch)
        return batch

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        return self._first("task_loss").task_loss(batch, output)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        return self._merged({name: part.penalties(batch, output) for name, part in self.parts.items()})

    def after_backward(self) -> None:
        for part in self._in_turn("after_backward"):
            part.after_backward()

    def after_step(self, batch: Examples, output: Output) -> None:
        for part in self._in_turn("after_step"):
            part.after_step(batch, output)

    def after_task(self, task: Task) -> None:
        for part in self._in_turn("after_task"):
            part.after_task(task)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def report(self) -> dict[str, float | None]:
        return self._merged({name: part.report() for name, part in self.parts.items()})

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return self._first("predict").predict(images, task_ids)

    def _those(self, holds: Callable[[Strategy], bool]) -> list[str]:
        """The parts for which something holds, as messages call them."""
        return [f"{name} ({type(part).__name__})" for name, part in self.parts.items() if holds(part)]

    def _in_turn(self, hook: str) -> list[Strategy]:
        first, last = TURNS[hook]

        def turn(part: Strategy) -> list[bool]:
            return [*(not getattr(part, trait) for trait in first), *(getattr(part, trait) for trait in last)]

        return sorted(self.parts.values(), key=turn)

    def _first(self, hook: str) -> Strategy:
        parts = [part for _, part in self._by_memory]
        return next((part for part in parts if _own(part, hook)), parts[0])

    @property
    def _by_memory(self) -> list[tuple[str, Strategy]]:
        """The parts, the one with a memory first."""
        return sorted(self.parts.items(), key=lambda named: not hasattr(named[1], "memory"))

    def _merged(self, named: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """All in one; a name that an earlier part has used is prefixed with the part's own."""
        merged: dict[str, Any] = {}
        for part, values in named.items():
            merged |= {f"{part}_{name}" if name in merged else name: value for name, value in values.items()}
        return merged


def _own(part: Strategy, hook: str) -> bool:
    return getattr(type(part), hook) is not getattr(Strategy, hook)
