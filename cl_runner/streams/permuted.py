"""One data set, with its pixels permuted differently in every task (Goodfellow et al., 2013, https://arxiv.org/abs/1312.6211)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_runner.streams.recipe import Remapped


@dataclass(kw_only=True)
class Permuted(Remapped):
    """Each task permutes the pixels, all channels alike, after padding and before any resizing.

    first_identity: leave the first task's images as they are; the other tasks' permutations stay the same.
    """

    first_identity: bool = True

    def sources(self, index: int, height: int, width: int) -> Tensor:
        if index == 0 and self.first_identity:
            return torch.arange(height * width)
        # All permutations up to this task's are drawn, so that they do not depend on the number of tasks.
        random = np.random.RandomState(self.seed)
        draws = [random.permutation(height * width) for _ in range(index + 1)]
        return torch.from_numpy(draws[index])
