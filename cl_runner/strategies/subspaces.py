"""Class means in one feature space per task (EASE: Zhou et al., 2024, arXiv 2403.12030)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Subspaces(nn.Module):
    """Sums of each class's features in each task's space; means of classes unseen in a space are synthesised."""

    sums: Tensor  # [T, K, D]
    counts: Tensor  # [T, K]

    def __init__(
        self, classes: Sequence[tuple[int, ...]], num_classes: int, num_features: int, device: torch.device
    ) -> None:
        """`classes`: of each task."""
        super().__init__()
        self.classes = classes
        shapes = {"sums": (len(classes), num_classes, num_features), "counts": (len(classes), num_classes)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, space: int, features: Tensor, labels: Tensor) -> None:
        """`features`: [N, D], as they are in `space`; `labels`: [N]."""
        self.sums[space].index_add_(0, labels, features)
        self.counts[space] += torch.bincount(labels, minlength=self.counts.shape[1])

    def means(self, spaces: int) -> Tensor:
        """[spaces, K, D]: of each class in each of the first spaces; zero for classes not seen yet.

        A class seen before a space existed gets a mean of the space's own classes, weighted by a softmax of its cosine
        similarities to them in the space of its own task, where all of them are known.
        """
        means = self.sums[:spaces] / self.counts[:spaces].clamp(min=1)[..., None]
        came = self.counts.bool().tolist()  # at once: each access would wait for the device
        for space in range(spaces):
            new = list(self.classes[space])
            for earlier in range(space):
                old = [label for label in self.classes[earlier] if not came[space][label]]
                alike = F.normalize(means[earlier, old]) @ F.normalize(means[earlier, new]).T
                means[space, old] = alike.softmax(1) @ means[space, new]
        return means

    def scores(self, features: Sequence[Tensor], alpha: float) -> Tensor:
        """[B, K], given the features [B, D] in each of the first spaces: the mean over spaces of cosines to the class
        means, with weight `alpha` in spaces of tasks without the class; -inf for classes not seen yet."""
        total = torch.zeros(len(features[0]), self.counts.shape[1]).to(self.sums)
        weight = torch.zeros_like(self.counts[0])
        for space, (rows, means) in enumerate(zip(features, self.means(len(features)), strict=True)):
            share = torch.full_like(self.counts[space], alpha)
            share[list(self.classes[space])] = 1.0
            weight += share
            total += share * (F.normalize(rows.to(self.sums)) @ F.normalize(means).T)
        total /= weight.clamp(min=torch.finfo(weight.dtype).tiny)  # zero for other tasks' classes if alpha is
        return total.masked_fill(self.counts.sum(0) == 0, -torch.inf)
