"""Collect the losses of a task's steps and record their means in the run's journal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cl_runner.progress import Position
from cl_runner.streams.base import Task


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite."""


class Losses:
    """A task's losses, which stay on the device and are read and checked every `log_every` steps."""

    def __init__(
        self,
        record: Callable[[dict[str, Any]], None],
        position: Position,
        task: Task,
        steps: int,
        steps_a_pass: int,
        log_every: int,
    ) -> None:
        """`record`: takes a row; `steps`: in the task; `steps_a_pass`: in one pass over its data."""
        self.record, self.position, self.task = record, position, task
        self.steps, self.steps_a_pass, self.log_every = steps, steps_a_pass, log_every
        self.done = 0  # steps of this task
        self.names: list[str] = []
        self.lr = 0.0
        self._clear()

    def add(self, terms: dict[str, Tensor], lr: float, images: int) -> None:
        self.names = list(terms)
        self.pending.append(torch.stack(list(terms.values())))
        self.images += images
        self.lr = lr
        self.done += 1
        self.position.steps += 1
        if self.done % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Record one row: the means over the steps since the last one.

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
        self.record(
            {
                "kind": "step",
                "task": self.task.index,
                "epoch": (self.done - 1) // self.steps_a_pass,
                "step": self.position.steps,
                "task_step": self.done,
                "task_steps": self.steps,
                "loss": means,
                "lr": self.lr,
                "timing": {"time": now, "images_per_second": self.images / max(now - self.since, 1e-9)},
            }
        )
        self._clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that the body takes out of the speed."""
        began = time.time()
        try:
            yield
        finally:
            self.since += time.time() - began

    def state_dict(self) -> dict[str, Any]:
        """The steps so far, and those of their losses that are not yet recorded."""
        return {
            "done": self.done,
            "names": self.names,
            "lr": self.lr,
            "images": self.images,
            "pending": list(self.pending),
            "seconds": time.time() - self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.names, self.lr = state["done"], state["names"], state["lr"]
        self.images, self.pending = state["images"], state["pending"]
        self.since = time.time() - state["seconds"]

    def _clear(self) -> None:
        self.pending: list[Tensor] = []
        self.images = 0
        self.since = time.time()
