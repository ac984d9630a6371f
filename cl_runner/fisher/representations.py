"""The ways to hold a Fisher, by name, and what each is summed up by."""

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor

from cl_runner.fisher.curvature import Curvature
from cl_runner.fisher.engine import SquaredGradients
from cl_runner.fisher.full import OuterProducts
from cl_runner.fisher.kernels import Precision
from cl_runner.fisher.kronecker import KroneckerFactors, RotatedSquares
from cl_runner.fisher.passes import SlicedVectors
from cl_runner.models.model import Model, PretrainedView

Representation = Literal["diagonal", "kfac", "ekfac", "full"]


class Accumulator(Protocol):
    """A running sum over samples of Σ_v (Jᵀv)(Jᵀv)ᵀ, or of what is kept of it; J = ∂z/∂θ, z a sample's logits.

    samples: how many the mean is over: those that were added; may be set, where others have no vectors.
    """

    samples: int

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples.

        Args:
            inputs: [B, C, H, W] float, preprocessed.
            passes: V, the vectors a sample, at most.
            vectors: (a slice of the batch, its logits [b, K]) -> its output vectors v [b, V, K]; asked for once for
                every slice.
        """
        ...

    def curvature(self) -> Curvature:
        """The mean over samples."""
        ...


def rounds(
    model: Model | PretrainedView, representation: Representation, precision: Precision = "fp32"
) -> Iterator[Accumulator]:
    """What all samples are to be added to before the next is asked for; the last one has the Fisher.

    `ekfac` takes the samples twice. `precision`: of `diagonal`, as `SquaredGradients` has it.

    Raises ConfigError for a model that is too large for `full`, and ValueError, which names the layer, for one whose
    samples do not stand for themselves.
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
