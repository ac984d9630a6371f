"""The full Fisher matrix, for models of a few thousand parameters: what the other representations approximate."""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Curvature, Diagonal
from cl_runner.fisher.engine import OUTPUT_NUMBERS, wide
from cl_runner.gradients.fallbacks import add_vmapped, even_slices, looped_gradients, vmapped_gradients
from cl_runner.gradients.passes import SlicedVectors
from cl_runner.gradients.trial import disagreement, refuse_batch_dependence, refuse_dependence
from cl_runner.models.heads import per_row
from cl_runner.models.model import Classifier, Parameters, trainable

LIMIT = 20_000  # parameters: their matrix takes 3.2 GB
# Added to the diagonal of the scaled matrix before it is solved with, relative to its norm: the first that makes it
# positive definite. In directions with less curvature than that, anchors cannot be told apart.
RIDGES = (1e-14, 1e-12, 1e-10)
STEPS = 3  # of iterative refinement, which undo most of that change
ROWS = 256  # gradients collected before their products are added: each addition touches the whole matrix


@dataclass(frozen=True)
class Full:
    """F over every pair of weights. In float64, where the device has it: see `merged`.

    matrix: [P, P], symmetric.
    shapes: of the parameters; flattened and concatenated, they index the matrix's rows.
    """

    matrix: Tensor
    shapes: dict[str, tuple[int, ...]]

    def quadratic(self, delta: Parameters) -> Tensor:
        flat = self._flat(delta)
        return flat @ (self.matrix @ flat)

    def product(self, delta: Parameters) -> Parameters:
        """In the precision of `delta`."""
        found = self._named(self.matrix @ self._flat(delta))
        return {name: values.to(delta[name].dtype) for name, values in found.items()}

    def plus(self, other: "Full", weight: float = 1.0) -> "Full":
        shapes = self.shapes | other.shapes
        return Full(torch.add(self._over(shapes), other._over(shapes), alpha=weight), shapes)

    def scaled(self, factor: float) -> "Full":
        return Full(factor * self.matrix, self.shapes)

    def only(self, names: Container[str]) -> "Full":
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        if len(shapes) == len(self.shapes):
            return self
        kept = torch.cat([torch.full((_size(shape),), name in shapes) for name, shape in self.shapes.items()])
        kept = kept.to(self.matrix.device)
        return Full(self.matrix[kept][:, kept], shapes)

    def only_rows(self, rows: dict[str, Tensor]) -> "Full":
        masks = {name: self.matrix.new_ones(shape) for name, shape in self.shapes.items()}
        for name in masks.keys() & rows.keys():
            masks[name] *= per_row(rows[name], masks[name])
        mask = self._flat(masks)
        return Full(self.matrix * mask * mask[:, None], self.shapes)

    def merged(
        self, anchor: Parameters, other: Curvature, other_anchor: Parameters
    ) -> tuple["Full", Parameters, Tensor] | None:
        """The merged anchor is in float64 like the matrix, whatever the weights are in.

        Where a direction has almost no curvature of its own but is correlated with others that do, the minimiser of the
        sum is far from both anchors; float32 would round such a mean by more than the stiff directions tolerate.
        """
        if not isinstance(other, Full):
            return None
        # As in `Diagonal`, no large numbers are subtracted: m = m1 + d with F d = F2 (m2 - m1).
        both = self.plus(other)
        one, two = (fisher._over(both.shapes) for fisher in (self, other))
        start, end = both._flat(other_anchor | anchor), both._flat(anchor | other_anchor)
        mean = start + _solution(both.matrix, two @ (end - start))
        # Exact for any mean, so for the one found.
        least = (mean - start) @ one @ (mean - start) + (end - mean) @ two @ (end - mean)
        return both, both._named(mean), least.clamp_min(0)

    def trace(self) -> Tensor:
        return self.matrix.trace()

    def diagonal(self) -> Diagonal:
        return Diagonal(self._named(self.matrix.diagonal().clone()))

    def _flat(self, values: Parameters) -> Tensor:
        """Flatten to [P], in the matrix's precision."""
        parts = [values[name].reshape(-1).to(self.matrix.dtype) for name in self.shapes]
        return torch.cat(parts) if parts else self.matrix.new_zeros(0)

    def _named(self, flat: Tensor) -> Parameters:
        parts = flat.split([_size(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def _over(self, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        """The matrix over these parameters, in their order; zero for those it does not cover."""
        if list(shapes.items()) == list(self.shapes.items()):
            return self.matrix
        starts, total = {}, 0
        for name, shape in shapes.items():
            starts[name], total = total, total + _size(shape)
        device = self.matrix.device
        where = [torch.arange(starts[name], starts[name] + _size(shape)) for name, shape in self.shapes.items()]
        index = torch.cat(where).to(device) if where else torch.zeros(0, dtype=torch.int64, device=device)
        matrix = self.matrix.new_zeros(total, total)
        matrix[index[:, None], index] = self.matrix
        return matrix


class OuterProducts:
    """The running sum over samples of Σ_v (Jᵀv)(Jᵀv)ᵀ, J = ∂z/∂θ, z a sample's logits and v its output vectors.

    Takes the same input as `SquaredGradients`, whose sums are its diagonal.

    samples: how many the mean is over.
    """

    def __init__(self, model: Classifier) -> None:
        """Raises ConfigError for a model with too many trainable parameters, and ValueError, naming the layer, for one
        whose answer to a sample depends on the rest of the batch."""
        self._parameters = trainable(model)
        size = sum(values.numel() for values in self._parameters.values())
        check_size(size)
        refuse_batch_dependence(model)
        self.model = model
        self.samples = 0
        self._gradients = vmapped_gradients
        self._rows: list[Tensor] = []
        self._total = wide(torch.zeros(size, size, device=model.device))

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples, as `SquaredGradients.add` does."""
        if self.samples == 0 and self._parameters:
            self._look(inputs[[0, -1]])
        self.samples += len(inputs)
        if not self._parameters:
            return
        most = max(1, OUTPUT_NUMBERS // max(1, passes * self.model.head.out_features))
        for rows in even_slices(len(inputs), most):
            self._gradients(self.model, inputs[rows], partial(vectors, rows), self._receive)

    def curvature(self) -> Full:
        """The mean over samples."""
        self._close()
        shapes = {name: tuple(values.shape) for name, values in self._parameters.items()}
        return Full(self._total / max(1, self.samples), shapes)

    def _look(self, inputs: Tensor) -> None:
        refuse_dependence(self.model, inputs)
        if disagreement(self.model, inputs, add_vmapped) is not None:
            self._gradients = looped_gradients

    def _receive(self, gradients: Parameters) -> None:
        """Collect `gradients`, [b, V, ...] each; parameters whose gradient is zero may be missing."""
        first = next(iter(gradients.values()))
        parts = [
            gradients[name].flatten(2) if name in gradients else first.new_zeros(*first.shape[:2], values.numel())
            for name, values in self._parameters.items()
        ]
        self._rows.append(torch.cat(parts, 2).flatten(0, 1))
        if sum(map(len, self._rows)) >= ROWS:
            self._close()

    def _close(self) -> None:
        if self._rows:
            rows = wide(torch.cat(self._rows))
            self._total.addmm_(rows.t(), rows)
            self._rows.clear()


def check_size(parameters: int) -> None:
    """Raises ConfigError if the full matrix over this many parameters is too large."""
    if parameters > LIMIT:
        raise ConfigError(
            "fisher.representation",
            f"expected at most {LIMIT:,} trainable parameters for full, got {parameters:,}, whose matrix would take "
            f"{8e-9 * parameters**2:,.1f} GB; choose ekfac or diagonal",
        )


def _solution(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve `matrix` d = `right`, which must have a solution, for d; zero where the matrix is zero.

    The matrix is usually singular, so a little of its own diagonal is added: in proportion, a parameter with little
    curvature is then changed no more than one with much.

    Raises torch.linalg.LinAlgError where the matrix is not positive semi-definite.
    """
    device, dtype = matrix.device, right.dtype
    if device.type == "mps":  # has neither float64 nor this factorisation
        matrix, right = matrix.cpu(), right.cpu()
    matrix, right = matrix.double(), right.double()
    scale = matrix.diagonal().clamp_min(0).rsqrt().nan_to_num(posinf=0)
    system = matrix * scale * scale[:, None]
    right = scale * right
    norm, diagonal = system.norm(), system.diagonal().clone()
    for share in RIDGES:
        ridge = share * norm + torch.finfo(norm.dtype).tiny
        system.diagonal().copy_(diagonal + ridge)
        factor, failed = torch.linalg.cholesky_ex(system, check_errors=share == RIDGES[-1])
        if not failed:
            break
    system.diagonal().copy_(diagonal)
    found = torch.zeros_like(right)
    for _ in range(1 + STEPS):
        found += torch.cholesky_solve((right - system @ found)[:, None], factor)[:, 0]
    return (scale * found).to(device=device, dtype=dtype)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Full])
