"""Learning one task: epochs, batches, and the step."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_runner.errors import ConfigError
from cl_runner.losses import Losses
from cl_runner.models.heads import keep_unreached_rows
from cl_runner.models.model import ActiveLogits, Model, Output
from cl_runner.progress import Pace, Position
from cl_runner.randomness import random_state, restore_random_state, task_seed
from cl_runner.ranges import Count, Seed
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Task, number_of_batches

log = logging.getLogger("cl_runner")


class FirstTask(BaseModel):
    """Settings of the first task that override the general ones: the budget, and arguments of the optimizer and the
    scheduler."""

    model_config = ConfigDict(extra="forbid")

    epochs: Count | None = None
    iterations: Count | None = None
    optimizer: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Trainer:
    """How to train: the budget of a task, the batches, the precision.

    Args:
        epochs, iterations: the budget of a task: passes over its data or, if given, steps, where the short last batch
            of a pass is dropped.
        first_task: settings of the first task alone; None: it has none of its own.
        accumulate: micro-batches to compute a batch in, for the same gradient with less memory; but layers that
            normalise by a batch's statistics then use a micro-batch's, and the gradients that A-GEM, GEM and MIR take
            themselves still take a whole batch at a time.
        optimizer_state: whether momentum and the like start empty in each task (reset). With keep, momentum and weight
            decay also move outputs that the loss does not see, as in protocols that keep one optimizer. Methods that
            restart from, or redraw, weights in each task start with an empty state in any case.
        active_logits: which outputs enter the loss: the current task's, those seen so far, or all; None: what the
            method's paper says, or else the scenario (task: current, domain: all, class: seen).
        precision: bf16 holds for the step alone (by autocast): passes that a method makes itself, as A-GEM, GEM and MIR
            do for their gradients, are computed in fp32.
        eval_every: steps between evaluations within a task, on the tasks so far; None: only after each task. Methods
            predict as ever: where they compare with exemplars or prototypes that they make after a task (iCaRL, EASE),
            the classes being learned have none yet, and are never named.
        drift_samples: held-out images on which to measure the distance from the pretrained model (0: not at all).
        checkpoint_every, checkpoint_seconds: steps and seconds between checkpoints within a task, whichever comes
            first; None: not for that reason. The run is saved after each task in any case.
        seed: of the order of the batches, dropout and augmentation.
    """

    epochs: Count = 5
    iterations: Count | None = None
    first_task: FirstTask | None = None
    batch_size: Count = 32
    accumulate: Count = 1
    optimizer_state: Literal["reset", "keep"] = "reset"
    clip_norm: PositiveFloat | None = None
    active_logits: ActiveLogits | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    deterministic: bool = False
    log_every: Count = 10
    eval_batch_size: Count = 512
    eval_every: Count | None = None
    drift_samples: NonNegativeInt = 512
    checkpoint_every: Count | None = None
    checkpoint_seconds: Annotated[float, Field(ge=1)] | None = 300.0
    keep_checkpoint: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that contradict each other."""
        if self.accumulate > self.batch_size:
            expected = f"expected at most batch_size={self.batch_size}"
            raise ConfigError("trainer.accumulate", f"{expected}, got {self.accumulate}")
        self.first_task = FirstTask.model_validate(self.first_task or {})
        if self.first_task.optimizer and self.optimizer_state == "keep":
            expected = "expected reset where the first task has an optimizer of its own"
            raise ConfigError("trainer.optimizer_state", f"{expected}, got 'keep'")


class Training:
    """The training of a run's model, task after task, with the one step that all strategies share."""

    def __init__(
        self,
        trainer: Trainer,
        model: Model,
        strategy: Strategy,
        make_optimizer: Callable[..., Optimizer],
        make_scheduler: Callable[..., LRScheduler],
        record: Callable[[dict[str, Any]], None],
        position: Position | None = None,
    ) -> None:
        """`strategy`: has set up the model; `record`: takes a row of the journal; `position`: the run's, which each
        step advances."""
        self.trainer, self.model, self.strategy = trainer, model, strategy
        self.make_optimizer, self.make_scheduler, self.record = make_optimizer, make_scheduler, record
        self.position = position or Position()
        self.pace = Pace(trainer.checkpoint_every, trainer.checkpoint_seconds)
        self.optimizer: Any = None  # an Optimizer once the first task is learned
        self.losses: Losses | None = None  # of the current task, while it is being learned
        self._kept: dict[str, Any] = {}  # what an earlier process has left and `learn` has not used yet
        self._keeps_state = trainer.optimizer_state == "keep"
        if self._keeps_state and (strategy.restarts or strategy.redraws):
            self._keeps_state = False
            log.warning("trainer.optimizer_state: reset, since %s starts from new weights", type(strategy).__name__)
        if strategy.offline and len(strategy.stream) > 1 and trainer.first_task != FirstTask():
            log.warning("trainer.first_task: unused, since %s learns all tasks at once", type(strategy).__name__)

    def state_dict(self) -> dict[str, Any]:
        """What `learn` needs to resume between two steps; between two tasks, the optimizer's state if that is kept."""
        if self.losses is None and (self.optimizer is None or not self._keeps_state):
            return {key: self._kept[key] for key in ("optimizer", "parameters") if key in self._kept}
        state = {"optimizer": self.optimizer.state_dict(), "parameters": self.parameter_names}
        if self.losses is not None:
            state["task"] = {
                "scheduler": self.scheduler.state_dict(),
                "reached": self.reached,
                "losses": self.losses.state_dict(),
                "random": random_state(self.model.device),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, in the next `learn`, from what `state_dict` returned."""
        self._kept = state

    def learn(
        self,
        task: Task,
        data: Examples,
        pause: Callable[[], None] = lambda: None,
        look: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train on `data` for the task's budget, or what is left of it.

        Between two steps `look` is called, with the number of steps so far, when `eval_every` says so, and `pause` when
        the pace says that it is time. Raises NonFiniteLossError that names the loss term.
        """
        trainer, strategy = self.trainer, self.strategy
        own = (trainer.first_task if task.index == 0 else None) or FirstTask()
        iterations = own.iterations or (None if own.epochs else trainer.iterations)
        budget = iterations and iterations * (len(strategy.stream) if strategy.offline else 1)
        steps_a_pass = number_of_batches(len(data), trainer.batch_size, drop_last=budget is not None)
        steps = budget or (own.epochs or trainer.epochs) * steps_a_pass
        if trainer.eval_every and trainer.eval_every >= steps:
            log.warning("trainer.eval_every: task %d has %d steps, and is evaluated only after them", task.index, steps)
        self._prepare(steps, own)
        self.losses = losses = Losses(self.record, self.position, task, steps, steps_a_pass, trainer.log_every)
        if kept := self._kept.pop("task", None):
            self._go_on(kept)
        else:
            self.model.train()
        self._kept = {}
        for batch in self._batches(task, data, drop_last=budget is not None):
            rate = float(self.scheduler.get_last_lr()[0])
            losses.add(self.step(batch.to(self.model.device)), rate, len(batch))
            if trainer.eval_every and losses.done % trainer.eval_every == 0 and losses.done < steps:
                with losses.paused():
                    look(losses.done)
            if self.position.steps >= self.pace.due:
                with losses.paused():
                    pause()
        losses.flush()
        self.losses = None

    def step(self, batch: Examples) -> dict[str, Tensor]:
        """One step of the optimizer, the same for all strategies. Returns the loss terms, averaged over the batch.

        Nothing in it waits for the device, unless a strategy's hook does, or a memory that groups its rows by class or
        task.
        """
        trainer, strategy, model, optimizer = self.trainer, self.strategy, self.model, self.optimizer
        batch = strategy.before_batch(batch)
        optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        outputs = []
        for part in batch.split(trainer.accumulate):
            share = len(part) / len(batch)
            with self._autocast():
                output = model(part.images, part.extras.get("features"))
                terms = {"task": strategy.task_loss(part, output), **strategy.penalties(part, output)}
                loss = torch.stack(list(terms.values())).sum() * share
            loss.backward()
            outputs.append(output)
            for name, term in {**terms, "total": loss / share}.items():
                means[name] = means.get(name, 0) + term.detach() * share
        strategy.after_backward()
        if trainer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, trainer.clip_norm)
        optimizer.step()
        self.scheduler.step()
        strategy.after_step(batch, outputs[0] if len(outputs) == 1 else _joined(outputs))
        return means

    def _batches(self, task: Task, data: Examples, drop_last: bool) -> Iterator[Examples]:
        """The task's remaining batches, in the order determined by its seed."""
        assert self.losses is not None, "a task is being learned"
        done, steps, steps_a_pass = self.losses.done, self.losses.steps, self.losses.steps_a_pass
        generator = torch.Generator().manual_seed(task_seed(self.trainer.seed, task.index))
        for _ in range(done // steps_a_pass):
            torch.randperm(len(data), generator=generator)  # the order of an earlier pass
        while done < steps:
            for batch in data.shuffled(self.trainer.batch_size, generator, drop_last, first=done % steps_a_pass):
                if done == steps:
                    return
                done += 1
                yield batch

    def _prepare(self, steps: int, own: FirstTask) -> None:
        """Create the task's optimizer, unless the last task's is kept, and its scheduler."""
        if self.optimizer is None or not self._keeps_state:
            self.optimizer = self._new_optimizer(own.optimizer)
        for group in self.optimizer.param_groups:  # the last task's schedule has changed a kept optimizer's rate
            group["lr"] = group.get("initial_lr", group["lr"])
        self.scheduler = self.make_scheduler(optimizer=self.optimizer, steps=steps, **own.scheduler)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _new_optimizer(self, own: dict[str, Any]) -> Optimizer:
        named, head = dict(self.model.named_parameters()), self.model.head
        self.parameter_names = self._kept.get("parameters") or [name for name, p in named.items() if p.requires_grad]
        optimizer = self.make_optimizer(params=[named[name] for name in self.parameter_names], **own)
        if "optimizer" in self._kept and "task" not in self._kept:
            optimizer.load_state_dict(self._kept["optimizer"])
        self.reached = [] if self._keeps_state else keep_unreached_rows(head, optimizer)
        return optimizer

    def _go_on(self, kept: dict[str, Any]) -> None:
        """Resume between two steps; model and strategy have been restored already."""
        assert self.losses is not None, "a task is being learned"
        self.optimizer.load_state_dict(self._kept["optimizer"])  # after creating the scheduler, which sets the rate
        self.scheduler.load_state_dict(kept["scheduler"])
        for rows, were in zip(self.reached, kept["reached"], strict=True):
            rows.copy_(were)
        self.losses.load_state_dict(kept["losses"])
        restore_random_state(kept["random"], self.model.device)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.trainer.precision == "bf16")


def _joined(outputs: list[Output]) -> Output:
    return Output(
        logits=torch.cat([output.logits for output in outputs]),
        features=torch.cat([output.features for output in outputs]),
        source=lambda: torch.cat([output.inputs for output in outputs]),
    )
