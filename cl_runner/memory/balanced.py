"""The same number of examples of each class (or of each task)."""

from typing import Literal

import torch
from torch import Tensor

from cl_runner.memory.base import Memory, Per, Share
from cl_runner.ranges import Count
from cl_runner.streams.base import Examples


class ClassBalanced(Memory):
    """Capacity is shared equally: when the memory is full, a new row replaces one of the largest group.

    random: a uniform sample of each group (with a shared capacity, close to the greedy balancing sampler of GDumb,
    Prabhu et al., 2020, algorithm 1, which draws the row to drop but never replaces a row by a later one of its class);
    newest: a ring buffer per group (Lopez-Paz & Ranzato, 2017; Chaudhry et al., 2019).
    """

    def __init__(
        self,
        *,
        size: Count = 500,
        per: Per = "all",
        share: Share = "class",
        keep: Literal["random", "newest"] = "random",
    ) -> None:
        super().__init__(size, per, share)
        self.keep = keep

    def rank(self, rows: Examples) -> Tensor:
        if self.keep == "random":
            return torch.rand(len(rows), dtype=torch.float64)
        newest = self._ranks.min() if len(self) else torch.zeros(())  # newer rows never leave before older ones
        return newest - torch.arange(1, len(rows) + 1, dtype=torch.float64)
