"""Means and covariances of classes, from features that arrive in parts."""

import torch
from torch import Tensor, nn


class Moments(nn.Module):
    """Counts, means and scatter matrices of each class's features, exact however they are split into parts.

    Parts are merged by the pairwise update of Chan, Golub & LeVeque (1979), which is stable for large means. Takes
    8 K D^2 bytes, or 8 D^2 if the classes share one covariance.
    """

    counts: Tensor  # [K]
    means: Tensor  # [K, D]
    scatter: Tensor  # [K, D, D], or [D, D] if shared: sum of (x - mean)(x - mean)'

    def __init__(self, num_classes: int, num_features: int, *, shared: bool, device: torch.device) -> None:
        super().__init__()
        self.shared = shared
        shapes = {"counts": (num_classes,), "means": (num_classes, num_features)}
        shapes["scatter"] = (*(() if shared else (num_classes,)), num_features, num_features)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """`features`: [N, D] float64; `labels`: [N]."""
        counts = torch.bincount(labels, minlength=len(self.counts)).to(features)
        means = torch.zeros_like(self.means).index_add_(0, labels, features) / counts.clamp(min=1)[:, None]
        centred = features - means[labels]
        share = counts / (self.counts + counts).clamp(min=1)  # [K]: of new examples among all
        shift = means - self.means
        between = (self.counts * share).sqrt()[:, None] * shift
        if self.shared:
            self.scatter += centred.T @ centred + between.T @ between
        else:
            for label in labels.unique().tolist():
                rows = torch.cat([centred[labels == label], between[label : label + 1]])
                self.scatter[label] += rows.T @ rows
        self.means += share[:, None] * shift
        self.counts += counts

    @property
    def seen(self) -> list[int]:
        """The classes with any examples so far."""
        return self.counts.nonzero().flatten().tolist()

    def covariance(self, label: int | None = None) -> Tensor:
        """[D, D] of one class, or within all classes; divided by the number of examples.

        Without `label`, each class is weighted by its number of examples.
        """
        if label is not None and not self.shared:
            return self.scatter[label] / self.counts[label].clamp(min=1)
        scatter = self.scatter if self.shared else self.scatter.sum(0)
        return scatter / self.counts.sum().clamp(min=1)

    def drawn(self, samples: int, jitter: float = 1e-4) -> tuple[Tensor, Tensor]:
        """`samples` features [N, D] from the Gaussian of each class seen, class by class, and their labels [N].

        `jitter` is added to the covariances' diagonals: from few examples, they are singular. Drawn on the CPU from the
        global generator, so that they are the same on every device.
        """
        parts = []
        for label in self.seen:
            covariance = self.covariance(label)
            factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance)).to(covariance))
            noise = torch.randn(samples, len(covariance)).to(covariance)
            parts.append(self.means[label] + noise @ factor.T)
        return torch.cat(parts), torch.tensor(self.seen).repeat_interleave(samples).to(self.counts.device)
