"""FeCAM: feature covariance-aware metric (Goswami et al., 2023, arXiv 2309.14062)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.ranges import Count
from cl_runner.strategies.closed_form import ClosedForm
from cl_runner.strategies.moments import Moments
from cl_runner.streams.base import Stream


class FeCAM(ClosedForm):
    """Train nothing: predict the class at the smallest Mahalanobis distance, under each class's own covariance.

    Features are raised to `power` (Tukey's ladder of powers; negative ones keep their sign). Covariances are shrunk to
    C + g1 v1 I + g2 v2 (1 - I), with v1 and v2 the means on and off their diagonal, and normalised to correlations.
    Means and covariances are those of the transformed features, where the authors' code transforms the means of the
    original ones.

    The defaults are those for convolutional networks, which the authors' code shrinks twice: g1 = g2 = 3 here. For its
    vision transformers: power=1 off_diagonal_shrinkage=0 unit_length=first. The shared covariance is within classes,
    where theirs is that of tasks.
    """

    saved = ("moments",)

    def __init__(
        self,
        *,
        power: PositiveFloat = 0.5,
        diagonal_shrinkage: NonNegativeFloat = 1.0,
        off_diagonal_shrinkage: NonNegativeFloat = 1.0,
        normalize: bool = True,
        unit_length: Literal["compared", "first"] | None = "compared",
        covariance: Literal["class", "shared"] = "class",
        batch_size: Count = 256,
    ) -> None:
        """The shrinkages are g1 and g2 above; `normalize`: covariances to correlations; `unit_length`: normalise
        features and means when they are compared, or features before all else; `covariance`: one of each class
        (8 K D^2 bytes, and as many again after the first prediction), or one shared by all."""
        super().__init__(batch_size)
        self.power, self.normalize, self.unit_length = power, normalize, unit_length
        self.diagonal_shrinkage, self.off_diagonal_shrinkage = diagonal_shrinkage, off_diagonal_shrinkage
        self.shared = covariance == "shared"

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.moments = Moments(
            stream.num_classes, model.head.in_features, shared=self.shared, device=self.float64_device
        )
        self.counts = self.moments.counts  # one tensor, filled in place
        self.factors: dict[int, Tensor] = {}  # of classes whose covariance is unchanged since; not saved

    def gather(self, features: Tensor, labels: Tensor) -> None:
        self.moments.add(self._transformed(features), labels)
        for label in self.moments.seen if self.shared else labels.unique().tolist():
            self.factors.pop(label, None)

    def fit(self) -> Callable[[Tensor], Tensor]:
        seen = self.moments.seen
        means = self._scaled(self.moments.means)
        for label in seen[:1] if self.shared else seen:
            if label not in self.factors:
                self.factors[label] = self._factor(label)

        def scores(features: Tensor) -> Tensor:
            features = self._scaled(self._transformed(features))
            result = torch.full((len(features), len(means)), -torch.inf).to(features)
            for label in seen:
                white = (features - means[label]) @ self.factors[seen[0] if self.shared else label]
                result[:, label] = -white.square().sum(1)
            return result

        return scores

    def _factor(self, label: int) -> Tensor:
        """W with W W' the inverse of the class's matrix: distances are lengths after W'.

        A pseudo-inverse, since without shrinkage the matrix may be singular.
        """
        covariance = self.moments.covariance(label)
        eye = torch.eye(len(covariance)).to(covariance)
        diagonal = covariance.diagonal().mean()
        if diagonal == 0:  # from a single example: no direction is known to matter
            return eye
        rest = (covariance * (1 - eye)).sum() / max(covariance.numel() - len(covariance), 1)
        shrunk = covariance + self.diagonal_shrinkage * diagonal * eye + self.off_diagonal_shrinkage * rest * (1 - eye)
        if self.normalize:
            deviation = shrunk.diagonal().clamp(min=torch.finfo(shrunk.dtype).tiny).sqrt()
            shrunk = shrunk / deviation[:, None] / deviation
        values, vectors = torch.linalg.eigh(shrunk)
        return vectors * torch.where(values > 1e-12 * values[-1], values, torch.inf).rsqrt()

    def _transformed(self, features: Tensor) -> Tensor:
        features = F.normalize(features) if self.unit_length == "first" else features
        return features.sign() * features.abs() ** self.power

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features) if self.unit_length == "compared" else features
