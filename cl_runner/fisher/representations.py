"""The representations of a Fisher by name, and their accumulators."""

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor

from cl_runner.fisher.curvature import Curvature
from cl_runner.fisher.engine import SquaredGradients
from cl_runner.fisher.full import OuterProducts
from cl_runner.fisher.kronecker import KroneckerFactors, RotatedSquares
from cl_runner.gradients.kernels import Precision
from cl_runner.gradients.passes import SlicedVectors
from cl_runner.models.model import Classifier

Representation = Literal["diagonal", "kfac", "ekfac", "full"]


class Accumulator(Protocol):
    """A running sum over samples of Σ_v (Jᵀv)(Jᵀv)ᵀ, or of the part that is kept; J = ∂z/∂θ, z a sample's logits.

    samples: how many the mean is over: those added, unless set to a larger number because others have no vectors.
    """

    samples: int

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples.

        Args:
            inputs: [B, C, H, W] float, preprocessed.
            passes: V, the most vectors per sample.
            vectors: (a slice of the batch, its logits [b, K]) -> its output vectors v [b, V, K]; called once per slice.
        """
        ...

    def curvature(self) -> Curvature:
        """The mean over samples."""
        ...


def rounds(model: Classifier, representation: Representation, precision: Precision = "fp32") -> Iterator[Accumulator]:
    """Accumulators, each to be given all samples before the next is asked for; the last one holds the Fisher.

    `ekfac` takes the samples twice. `precision`: for `diagonal`, that of `SquaredGradients`.

    Raises ConfigError for a model that is too large for `full`, and ValueError, naming the layer, for one whose answer
    to a sample depends on the rest of the batch.
    """
    if representation == "diagonal":
        yield SquaredGradients(model, precision=precision)
    elif representation == "full":
        yield OuterProducts(model)
    else:
        factors = KroneckerFactors(model)
        yield factors
        if representation == "ekfac":
            yield RotatedSquares(factors)
