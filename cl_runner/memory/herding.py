"""The examples whose mean best approximates their class's mean (Welling, 2009; iCaRL, Rebuffi et al., 2017,
arXiv 1611.07725, algorithms 4 and 5)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.memory.base import Features, Memory, Per, Share
from cl_runner.ranges import Count
from cl_runner.streams.base import Examples

CHUNK = 256  # images per forward pass


class Herding(Memory):
    """Rows of each class in each task, ranked by the order in which herding picks them: however few stay, they are
    those that it would pick if asked for that many."""

    streaming: ClassVar[bool] = False

    def __init__(
        self,
        *,
        size: Count = 500,
        per: Per = "all",
        share: Share = "class",
        normalize: bool = True,
        normalize_mean: bool = False,
    ) -> None:
        """`normalize`: features to length one, as in iCaRL; `normalize_mean`: the class's mean, too, before picking
        examples, as in van de Ven's code (but not in the authors')."""
        super().__init__(size, per, share)
        self.normalize, self.normalize_mean = normalize, normalize_mean

    def rank(self, rows: Examples) -> Tensor:
        raise TypeError("herding chooses among all of a task's examples by their features: call add_task")

    @torch.no_grad()
    def add_task(self, examples: Examples, features: Features) -> None:
        found = torch.cat([features(chunk).float() for chunk in examples.images.split(CHUNK)])  # [N, D]
        found = F.normalize(found) if self.normalize else found
        ranks = torch.full((len(examples),), torch.inf, dtype=torch.float64)
        cells = torch.stack([examples.task_ids, examples.labels], 1).cpu()
        rows_of = [(cells == cell).all(1).nonzero()[:, 0] for cell in cells.unique(dim=0)]
        for rows, most in zip(rows_of, self._room(examples, rows_of), strict=True):
            picked = herd(found[rows.to(found.device)], most, self.normalize_mean).cpu()
            ranks[rows[picked]] = torch.arange(len(picked), dtype=torch.float64)
        self._admit(examples, ranks)

    def _room(self, examples: Examples, rows_of: list[Tensor]) -> list[int]:
        """An upper bound on how many rows of each class in a task can stay, whichever herding picks: one more than stay
        in their present order, since ties go to the row that comes first."""
        ranks = torch.empty(len(examples), dtype=torch.float64)
        for rows in rows_of:
            ranks[rows] = torch.arange(len(rows), dtype=torch.float64)
        groups = torch.cat([self._groups, self._groups_of(examples)])
        kept = torch.from_numpy(self._kept(groups.numpy(), torch.cat([self._ranks, ranks]).numpy()))[len(self) :]
        return [min(len(rows), int(kept[rows].sum()) + 1) for rows in rows_of]


def herd(features: Tensor, count: int, normalize_mean: bool = False) -> Tensor:
    """The first `count` rows that herding picks of features [N, D], int64 in this order.

    Each brings the mean of those picked as near as possible to the mean of all, which `normalize_mean` scales to length
    one first.
    """
    mean, norms = features.mean(0), features.square().sum(1)
    mean = F.normalize(mean, dim=0) if normalize_mean else mean
    total, left = torch.zeros_like(mean), torch.ones_like(norms, dtype=torch.bool)
    picked = []
    for number in range(1, count + 1):
        # |number * mean - total - f|^2, without terms that do not depend on f
        distance = norms - 2 * (features @ (number * mean - total))
        best = distance.masked_fill(~left, torch.inf).argmin()
        picked.append(best)
        total = total + features[best]
        left[best] = False
    return torch.stack(picked)
