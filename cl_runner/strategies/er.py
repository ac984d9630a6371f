"""Experience replay (Chaudhry et al., 2019, arXiv 1902.10486; weighted losses: van de Ven et al., 2022, Nature Machine
Intelligence 4, Methods)."""

import math
from typing import Literal

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.memory.base import Memory
from cl_runner.models.model import Output
from cl_runner.ranges import Count
from cl_runner.strategies.rehearsal import Rehearsal, Store, weighted
from cl_runner.streams.base import Examples, Task


class ER(Rehearsal):
    """Train on each batch together with one drawn from memory."""

    saved = ("memory", "number")

    def __init__(
        self,
        *,
        memory: Memory,
        replay_batch_size: Count | None = None,
        mode: Literal["concatenated", "weighted", "oversampled"] = "concatenated",
        store: Store = "step",
    ) -> None:
        """`mode`: concatenated: one batch, all rows weighted equally (algorithm 1); weighted: in task k = 1, 2, … the
        mean loss of the fresh rows has weight 1/k, that of the replayed ones 1 - 1/k; oversampled: the memory, repeated
        up to the size of the task's data, is shuffled into it. `store`: see Rehearsal."""
        super().__init__(memory=memory, replay_batch_size=replay_batch_size, store=store)
        if mode == "oversampled" and (store, replay_batch_size) != ("task", None):
            field, given = ("store", store) if store != "task" else ("replay_batch_size", replay_batch_size)
            wanted = "task" if field == "store" else "null"
            raise ConfigError(f"strategy.{field}", f"expected {wanted} with mode=oversampled, got {given!r}")
        self.mode = mode
        self.number = 1  # of the task, from 1

    def before_task(self, task: Task) -> None:
        self.number = task.index + 1

    def training_data(self, task: Task) -> Examples:
        if self.mode != "oversampled" or not len(self.memory):
            return task.train
        data, held = task.train, self.memory.examples
        rows = torch.randperm(len(held)).repeat(max(1, math.ceil(len(data) / len(held))))[: max(len(data), len(held))]
        return data + held[rows.to(held.labels.device)].to(data.labels.device)

    def with_replay(self, batch: Examples) -> Examples:
        if self.mode == "concatenated":
            return super().with_replay(batch)
        if self.mode == "oversampled" or self.number == 1 or not len(self.memory):
            return batch
        share = 1 / self.number
        return weighted([(batch, {"weight": share}), (self.replay(batch), {"weight": 1 - share})])

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        if "weight" not in batch.extras:
            return super().task_loss(batch, output)
        return (batch.extras["weight"] * self.row_losses(batch, output)).mean()
