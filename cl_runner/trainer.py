"""Learning one task: epochs, batches, and the step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_runner.errors import ConfigError
from cl_runner.models.heads import keep_unreached_rows
from cl_runner.models.model import ActiveLogits, Model, Output
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Seed, Task, number_of_batches

Count = Annotated[int, Field(ge=1)]


class NonFiniteLossError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Position:
    """How far a run has come."""

    tasks: int = 0  # learned
    steps: int = 0  # the optimizer has made, all tasks together
    rows: int = 0  # in the journal


@dataclass
class Work:
    """What a trainer trains: the pieces that one run is made of."""

    model: Model
    strategy: Strategy
    make_optimizer: Callable[..., Optimizer]
    make_scheduler: Callable[..., LRScheduler]
    record: Callable[[dict[str, Any]], None]  # takes a journal row
    position: Position


class Trainer:
    """The budget of a task, the precision, and the one step that all strategies share."""

    def __init__(
        self,
        *,
        epochs: Count = 5,
        iterations: Count | None = None,
        batch_size: Count = 32,
        accumulate: Count = 1,
        optimizer_state: Literal["reset", "keep"] = "reset",
        clip_norm: Annotated[float, Field(gt=0)] | None = None,
        active_logits: ActiveLogits | None = None,
        precision: Literal["fp32", "tf32", "bf16"] = "fp32",
        compile: bool = False,
        deterministic: bool = False,
        log_every: Count = 10,
        eval_batch_size: Count = 512,
        drift_samples: Annotated[int, Field(ge=0)] = 512,
        keep_checkpoint: bool = False,
        seed: Seed = 0,
    ) -> None:
        """`epochs` or, if given, `iterations`: the budget a task; iterations drop the short last batch of a pass.
        `accumulate`: micro-batches that a batch is computed in, with the same gradient and less memory.
        `optimizer_state`: whether momentum and the like start empty in each task. `active_logits`: which outputs enter
        the loss: the task's own (current), those of all tasks so far (seen) or all; null for what the scenario says
        (task: current, domain: all, class: seen). `drift_samples`: held-out images on which the distance from the
        pretrained model is measured (0: not at all). `seed`: of the order of the batches, dropout and augmentation."""
        if accumulate > batch_size:
            raise ConfigError("trainer.accumulate", f"expected at most batch_size={batch_size}, got {accumulate}")
        self.epochs, self.iterations, self.batch_size, self.accumulate = epochs, iterations, batch_size, accumulate
        self.optimizer_state, self.clip_norm, self.active_logits = optimizer_state, clip_norm, active_logits
        self.precision, self.compile, self.deterministic = precision, compile, deterministic
        self.log_every, self.eval_batch_size, self.drift_samples = log_every, eval_batch_size, drift_samples
        self.keep_checkpoint, self.seed = keep_checkpoint, seed
        self.optimizer: Any = None  # an Optimizer once the first task is learned

    def start(self, work: Work, kept: dict[str, Any] | None = None) -> None:
        """Take up the pieces of a run, and the optimizer's state where an earlier process kept one."""
        self.work, self._kept = work, kept

    def optimizer_to_keep(self) -> dict[str, Any] | None:
        """What the next task's optimizer starts from, if it does not start afresh."""
        return self.optimizer.state_dict() if self.optimizer is not None and self.optimizer_state == "keep" else None

    def learn(self, task: Task, data: Examples) -> None:
        """Train on `data` for the task's budget.

        Raises NonFiniteLossError, which names the loss term.
        """
        work, generator = self.work, torch.Generator().manual_seed(self.seed * 1_000_003 + task.index)
        budget = self.iterations and self.iterations * (len(work.strategy.stream) if work.strategy.offline else 1)
        steps_a_pass = number_of_batches(len(data), self.batch_size, drop_last=budget is not None)
        steps = budget or self.epochs * steps_a_pass
        if self.optimizer is None or self.optimizer_state == "reset":
            self.optimizer = self._new_optimizer()
        for group in self.optimizer.param_groups:  # a kept optimizer's rate is where the last task's schedule left it
            group["lr"] = group.get("initial_lr", group["lr"])
        self.scheduler = work.make_scheduler(optimizer=self.optimizer, steps=steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        journal = Journal(work, task, steps, steps_a_pass, self.log_every)
        work.model.train()
        for batch in self._batches(data, budget, generator):
            rate = float(self.scheduler.get_last_lr()[0])
            journal.add(self.step(batch.to(work.model.device)), rate, len(batch))
        journal.flush()

    def step(self, batch: Examples) -> dict[str, Tensor]:
        """THE step: the only place in the project where weights learn. Nothing in it waits for the device."""
        strategy, model, optimizer = self.work.strategy, self.work.model, self.optimizer
        batch = strategy.before_batch(batch)
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        outputs = []
        for part in batch.split(self.accumulate):
            share = len(part) / len(batch)
            with self._autocast():
                output = model(part.images)
                terms = {"task": strategy.task_loss(part, output), **strategy.penalties(part, output)}
                loss = torch.stack(list(terms.values())).sum() * share
            loss.backward()
            outputs.append(output)
            for name, term in {**terms, "total": loss / share}.items():
                losses[name] = losses.get(name, 0) + term.detach() * share
        strategy.after_backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        optimizer.step()
        self.scheduler.step()
        strategy.after_step(batch, outputs[0] if len(outputs) == 1 else _joined(outputs))
        return losses

    def _batches(self, data: Examples, iterations: int | None, generator: torch.Generator) -> Iterator[Examples]:
        if iterations is None:
            for _ in range(self.epochs):
                yield from data.batches(self.batch_size, generator)
            return
        made = 0
        while made < iterations:
            for batch in data.batches(self.batch_size, generator, drop_last=True):
                if made == iterations:
                    return
                made += 1
                yield batch

    def _new_optimizer(self) -> Optimizer:
        model = self.work.model
        optimizer = self.work.make_optimizer(params=[p for p in model.parameters() if p.requires_grad])
        if self._kept is not None:
            optimizer.load_state_dict(self._kept)
        if self.optimizer_state == "reset":
            keep_unreached_rows(model.head, optimizer)
        return optimizer

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.work.model.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Journal:
    """A task's losses: they stay on the device and are read, and checked, every `log_every` steps."""

    def __init__(self, work: Work, task: Task, steps: int, steps_a_pass: int, log_every: int) -> None:
        self.work, self.task, self.steps, self.log_every = work, task, steps, log_every
        self.steps_a_pass = steps_a_pass
        self.done = 0
        self._clear()

    def add(self, losses: dict[str, Tensor], lr: float, images: int) -> None:
        self.names = list(losses)
        self.pending.append(torch.stack(list(losses.values())))
        self.images += images
        self.lr = lr
        self.done += 1
        self.work.position.steps += 1
        if self.done % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Write one row: the means over the steps since the last one.

        Raises NonFiniteLossError.
        """
        if not self.pending:
            return
        means = dict(zip(self.names, torch.stack(self.pending).float().mean(0).tolist(), strict=True))
        bad = [name for name, value in means.items() if not (abs(value) < float("inf")) and name != "total"]
        if bad:
            raise NonFiniteLossError(
                f"the loss is not finite in task {self.task.index}, at step {self.done} or up to "
                f"{len(self.pending) - 1} before: {', '.join(f'{name}={means[name]}' for name in bad)}"
                "; a smaller optimizer.lr or strategy.strength, or trainer.clip_norm, keeps it finite"
            )
        now = time.time()
        self.work.record(
            {
                "kind": "step",
                "task": self.task.index,
                "epoch": (self.done - 1) // self.steps_a_pass,
                "step": self.work.position.steps,
                "task_step": self.done,
                "task_steps": self.steps,
                "loss": means,
                "lr": self.lr,
                "timing": {"time": now, "images_per_second": self.images / max(now - self.since, 1e-9)},
            }
        )
        self._clear()

    def _clear(self) -> None:
        self.pending: list[Tensor] = []
        self.images = 0
        self.since = time.time()


def _joined(outputs: list[Output]) -> Output:
    return Output(
        *(torch.cat(parts) for parts in zip(*((o.logits, o.features, o.inputs) for o in outputs), strict=True))
    )
