"""As many examples of each class (or of each task) as of any other."""

from typing import Literal

import torch
from torch import Tensor

from cl_runner.memory.base import Memory, Per, Share
from cl_runner.ranges import Count
from cl_runner.streams.base import Examples


class ClassBalanced(Memory):
    """Room is shared equally: what comes in when all is full takes the place of a row of the largest group.

    random: of each group a uniform sample (with the room in all, the greedy balancing sampler of GDumb, Prabhu et
    al., 2020, which draws the row that leaves, but never replaces one of a class by a later one of it); newest: a ring
    buffer each (Lopez-Paz & Ranzato, 2017; Chaudhry et al., 2019).
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
        newest = self._ranks.min() if len(self) else torch.zeros(())  # never thrown out before an older one
        return newest - torch.arange(1, len(rows) + 1, dtype=torch.float64)
