"""A uniform sample of all rows seen so far (Vitter, 1985: reservoir sampling)."""

import torch
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.ranges import Count
from cl_runner.streams.base import Examples


class Reservoir(Memory):
    """Every row seen so far is held with the same probability, whatever its class and task.

    Each row gets a random number, and the lowest stay: the same distribution as Vitter's algorithm R. A row offered
    again in a later epoch counts as another row.
    """

    def __init__(self, *, size: Count = 500) -> None:
        super().__init__(size, "all", None)

    def add(self, batch: Examples) -> None:
        ranks = self.rank(batch)
        worst = self._ranks.max() if len(self) == self.size else torch.inf
        low = (ranks < worst).nonzero()[:, 0]
        if len(low):  # rarer as the stream grows: most batches need no sorting
            self._admit(batch[low.to(batch.labels.device, non_blocking=True)], ranks[low])

    def rank(self, rows: Examples) -> Tensor:
        return torch.rand(len(rows), dtype=torch.float64)
