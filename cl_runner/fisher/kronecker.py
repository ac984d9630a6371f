"""A Kronecker-factored Fisher: a block for every linear layer and convolution, a diagonal for everything else.

A layer y = W x + b, applied at T positions of a sample (tokens, pixels), has the per-sample gradient D = Σ_t g_t a_tᵀ
with respect to [W b]; a = [x 1], g the gradient of y. Its block of the Fisher, E Σ_v vec(D) vec(D)ᵀ, becomes G ⊗ A
(KFAC; Martens & Grosse, 2015, https://arxiv.org/abs/1503.05671; as a penalty against forgetting, Ritter et al., 2018,
https://arxiv.org/abs/1805.07810), with

    A = E a aᵀ, the mean over samples and positions,    G = E Σ_v Σ_t g_t g_tᵀ, the mean over samples.

Between layers it is zero. The scale is that of `expand` in Eschenhagen et al. (2023, https://arxiv.org/abs/2311.00636)
and, for convolutions, where a are patches, that of KFC (Grosse & Martens, 2016, https://arxiv.org/abs/1602.01407),
which puts the number of positions into A instead of G. F is a mean over samples, as in the other representations, and
has about their trace as long as the gradients at different positions are uncorrelated. Where they add up, as before a
mean over tokens, its trace is smaller by a factor of up to T.

EKFAC (George et al., 2018, https://arxiv.org/abs/1806.03884) keeps the eigenvectors and measures, along each of their
products, the second moment of the per-sample gradients themselves. It has the true trace and is, of all matrices with
these eigenvectors, the closest to the block in the Frobenius norm. It takes the samples twice.
"""

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Curvature, Diagonal, finite
from cl_runner.fisher.engine import OUTPUT_NUMBERS, Sums
from cl_runner.gradients.convolutions import Convolution
from cl_runner.gradients.fallbacks import even_slices
from cl_runner.gradients.graphs import side_stream
from cl_runner.gradients.layers import Linear, Uncovered, Use
from cl_runner.gradients.passes import SlicedVectors, Vectors, add_passes
from cl_runner.gradients.products import CACHE, ROOM, slices
from cl_runner.gradients.taps import Taps
from cl_runner.gradients.trial import disagreement, refuse_batch_dependence
from cl_runner.models.heads import per_row
from cl_runner.models.model import Classifier, Parameters, trainable

HELD = 1 << 27  # numbers in all layers' inputs, at all positions, held at a time


@dataclass(frozen=True)
class Factors:
    """G ⊗ A, over the entries of an [N, K] matrix.

    outputs: G, [N, N].
    inputs: A, [K, K].
    """

    outputs: Tensor
    inputs: Tensor

    def product(self, values: Tensor) -> Tensor:
        return self.outputs @ values @ self.inputs

    def diagonal(self) -> Tensor:
        """[N, K]."""
        return torch.outer(self.outputs.diagonal(), self.inputs.diagonal())

    def scaled(self, factor: float) -> "Factors":
        return replace(self, outputs=factor * self.outputs)

    def columns(self, kept: Tensor) -> "Factors":
        return replace(self, inputs=self.inputs[kept][:, kept])


@dataclass(frozen=True)
class Rotated:
    """(U ⊗ V) diag(moments) (U ⊗ V)ᵀ, over the entries of an [N, K] matrix.

    outputs: U, the eigenvectors of G as columns, [N, N].
    inputs: V, those of A, [K, K]; with fewer rows if columns of the [N, K] matrix were left out.
    moments: [N, K].
    """

    outputs: Tensor
    inputs: Tensor
    moments: Tensor

    def product(self, values: Tensor) -> Tensor:
        rotated = self.outputs.t() @ values @ self.inputs
        return self.outputs @ (rotated * self.moments) @ self.inputs.t()

    def diagonal(self) -> Tensor:
        """[N, K]."""
        return self.outputs.square() @ self.moments @ self.inputs.square().t()

    def scaled(self, factor: float) -> "Rotated":
        return replace(self, moments=factor * self.moments)

    def columns(self, kept: Tensor) -> "Rotated":
        return replace(self, inputs=self.inputs[kept])


@dataclass(frozen=True)
class Block:
    """One layer's part of a Fisher.

    shapes: of its weight and bias, if present: side by side, with all dimensions but the first flattened, they are the
        [N, K] matrix that `matrix` is over.
    kept: [N, K], 0 for entries without curvature, else 1; None: all have some.
    """

    matrix: Factors | Rotated
    shapes: dict[str, tuple[int, ...]]
    kept: Tensor | None = None

    def product(self, delta: Parameters) -> Parameters:
        values = self._masked(self._joined(delta))
        return self._named(self._masked(self.matrix.product(values)))

    def diagonal(self) -> Parameters:
        return self._named(self._masked(self.matrix.diagonal()))

    def scaled(self, factor: float) -> "Block":
        return replace(self, matrix=self.matrix.scaled(factor))

    def only(self, names: Container[str]) -> "Block":
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        if len(shapes) == len(self.shapes):
            return self
        widths = zip(self.shapes, self._widths(), strict=True)
        columns = torch.cat([torch.full((width,), name in shapes) for name, width in widths])
        columns = columns.to(self.matrix.inputs.device)
        kept = None if self.kept is None else self.kept[:, columns]
        return Block(self.matrix.columns(columns), shapes, kept)

    def only_rows(self, rows: dict[str, Tensor]) -> "Block":
        if rows.keys().isdisjoint(self.shapes):
            return self
        masks = {name: self.matrix.inputs.new_ones(shape) for name, shape in self.shapes.items()}
        for name in masks.keys() & rows.keys():
            masks[name] *= per_row(rows[name], masks[name])
        return replace(self, kept=self._masked(self._joined(masks)))

    def _masked(self, values: Tensor) -> Tensor:
        return values if self.kept is None else values * self.kept

    def _widths(self) -> list[int]:
        return [torch.Size(shape).numel() // len(self.matrix.outputs) for shape in self.shapes.values()]

    def _joined(self, values: Parameters) -> Tensor:
        """[N, K]."""
        return torch.cat([values[name].reshape(len(self.matrix.outputs), -1) for name in self.shapes], 1)

    def _named(self, joined: Tensor) -> Parameters:
        parts = joined.split(self._widths(), 1)
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


@dataclass(frozen=True)
class Kronecker:
    """A sum of blocks, and a diagonal over the parameters without one.

    A sum of two Kronecker products is not a Kronecker product. So `plus` keeps the blocks of both, which is exact, but
    its result grows with every addition, in memory and in the time of a product. For the same reason, quadratics around
    two anchors are not merged: a penalty keeps one term per task.
    """

    blocks: tuple[Block, ...]
    rest: Diagonal

    def quadratic(self, delta: Parameters) -> Tensor:
        terms = [(values * delta[name]).sum() for name, values in self.product(delta).items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def product(self, delta: Parameters) -> Parameters:
        return self._summed(self.rest.product(delta), lambda block: block.product(delta))

    def plus(self, other: "Kronecker", weight: float = 1.0) -> "Kronecker":
        return Kronecker(self.blocks + other.scaled(weight).blocks, self.rest.plus(other.rest, weight))

    def scaled(self, factor: float) -> "Kronecker":
        return Kronecker(tuple(block.scaled(factor) for block in self.blocks), self.rest.scaled(factor))

    def only(self, names: Container[str]) -> "Kronecker":
        blocks = [block.only(names) for block in self.blocks if any(name in names for name in block.shapes)]
        return Kronecker(tuple(blocks), self.rest.only(names))

    def only_rows(self, rows: dict[str, Tensor]) -> "Kronecker":
        return Kronecker(tuple(block.only_rows(rows) for block in self.blocks), self.rest.only_rows(rows))

    def merged(self, anchor: Parameters, other: Curvature, other_anchor: Parameters) -> None:
        return None

    def trace(self) -> Tensor:
        return self.diagonal().trace()

    def diagonal(self) -> Diagonal:
        return Diagonal(self._summed(self.rest.values, Block.diagonal))

    def _summed(self, rest: Parameters, part: Callable[[Block], Parameters]) -> Parameters:
        found = dict(rest)
        for block in self.blocks:
            for name, values in part(block).items():
                found[name] = found[name] + values if name in found else values
        return found


class Layer(NamedTuple):
    """A layer that has factors."""

    shapes: dict[str, tuple[int, ...]]  # of its weight and, if trainable, its bias
    outputs: int  # N
    inputs: int  # K, including the 1 that stands for the bias
    positions: int  # T

    def rows(self, use: Use, some: slice = slice(None)) -> Tensor:
        """a at every position of some samples, [b, T, K]."""
        assert isinstance(use, (Linear, Convolution))
        rows = use.rows[some] if isinstance(use, Linear) else use.patches(some)
        return F.pad(rows, (0, 1), value=1.0) if len(self.shapes) == 2 else rows

    def gradient_rows(self, use: Use, gradient: Tensor) -> Tensor:
        """g at every position, [B, T, N]."""
        return use.gradient_rows(gradient) if isinstance(use, Linear) else gradient.flatten(2).transpose(1, 2)


class KroneckerFactors:
    """The running sums over samples of the factors of every layer that has them, and of squares for all the rest.

    Takes the same input as `SquaredGradients`. Linear layers and two-dimensional convolutions without groups have
    factors; normalisations, tables, convolutions with groups or along other axes, biases alone, and parameters that
    belong to no layer or are used more than once, keep their diagonal.

    samples: how many the mean is over; more than were added if the others have no vectors. A is the mean over those
        that were added.
    """

    def __init__(self, model: Classifier) -> None:
        """Raises ValueError, naming the layer, if the model's answer to a sample depends on the rest of the batch."""
        refuse_batch_dependence(model)
        self.model = model
        self.samples = 0
        self.layers: dict[str, Layer] = {}  # by the name of the weight
        self.numbers = 1  # held at a time for each sample
        self.parameters = trainable(model)
        self._added = 0
        self._inputs, self._outputs, self._squares = Sums({}), Sums({}), Sums({})

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples, as `SquaredGradients.add` does.

        Raises ConfigError for a model with a parameter that no rule covers.
        """
        if self._added == 0:
            self._look(inputs)
        self.samples += len(inputs)
        self._added += len(inputs)
        for rows in even_slices(len(inputs), self.at_a_time(passes)):
            self._add(inputs[rows], partial(vectors, rows))
        for sums in (self._inputs, self._outputs, self._squares):
            sums.close_batch()

    def at_a_time(self, passes: int) -> int:
        """How many samples fit into memory."""
        return max(1, min(OUTPUT_NUMBERS // max(1, passes * self.model.head.out_features), HELD // self.numbers))

    def layer(self, use: Use) -> Layer | None:
        return self.layers.get(use.names.get("weight", ""))

    def factors(self) -> dict[str, Factors]:
        """Factors by the name of the weight, in float64 where the device has it."""
        outputs, inputs = self._outputs.over(self.samples), self._inputs.over(self._added)
        return {name: Factors(outputs[name], inputs[name]) for name in self.layers}

    def rest(self) -> Diagonal:
        means = self._squares.over(self.samples)
        return Diagonal({name: torch.empty_like(self.parameters[name]).copy_(means[name]) for name in means})

    def curvature(self) -> Kronecker:
        """The means over samples, in the parameters' own precision."""
        blocks = []
        for name, factors in self.factors().items():
            dtype = self.parameters[name].dtype
            matrix = Factors(factors.outputs.to(dtype), factors.inputs.to(dtype))
            blocks.append(Block(matrix, self.layers[name].shapes))
        return Kronecker(tuple(blocks), self.rest())

    def _look(self, inputs: Tensor) -> None:
        """Find the layers that have factors."""
        reason = disagreement(self.model, inputs[[0, -1]]) if self.parameters else None
        if reason is not None:
            raise _not_held(reason)
        uses = Taps(self.model, inputs[[0, -1]]).uses
        calls = Counter(name for use in uses for name in use.names.values())
        for use in uses:
            if any(calls[name] > 1 for name in use.names.values()):
                self.numbers += sum(self.parameters[name].numel() for name in use.names.values())
            elif _has_factors(use):
                layer = self.layers[use.names["weight"]] = self._layer(use)
                self.numbers += layer.positions * layer.inputs
        like = self.parameters
        sizes = {name: (layer.outputs, layer.inputs) for name, layer in self.layers.items()}
        self._outputs = Sums({name: like[name].new_zeros(n, n) for name, (n, _) in sizes.items()})
        self._inputs = Sums({name: like[name].new_zeros(k, k) for name, (_, k) in sizes.items()})
        held = {name for layer in self.layers.values() for name in layer.shapes}
        self._squares = Sums({name: p.new_zeros(p.shape) for name, p in like.items() if name not in held})

    def _layer(self, use: Use) -> Layer:
        assert isinstance(use, (Linear, Convolution))
        names = [use.names[role] for role in ("weight", "bias") if role in use.names]
        shapes = {name: tuple(self.parameters[name].shape) for name in names}
        positions, columns = (use.rows if isinstance(use, Linear) else use.patches(slice(0, 1))).shape[1:]
        outputs = self.parameters[names[0]].numel() // columns
        return Layer(shapes, outputs, columns + len(names) - 1, positions)

    def _add(self, inputs: Tensor, vectors: Vectors) -> None:
        try:
            with side_stream(inputs.device):  # since passes may be captured as a CUDA graph
                self._add_passes(inputs, vectors)
        except Uncovered as uncovered:  # the model does something else on this batch than on the first
            raise _not_held(str(uncovered)) from None

    def _add_passes(self, inputs: Tensor, vectors: Vectors) -> None:
        taps = Taps(self.model, inputs)
        outputs = vectors(taps.logits.detach())

        def take(use: Use, gradient: Tensor) -> bool:
            layer = self.layer(use)
            if layer is None:
                return False
            rows = layer.gradient_rows(use, gradient).flatten(0, 1)
            self._outputs.partial[use.names["weight"]].addmm_(rows.t(), rows)
            return True

        for use in taps.uses:
            if (layer := self.layer(use)) is not None:
                _add_input_products(self._inputs.partial[use.names["weight"]], use, layer)
        add_passes(taps, outputs, self._squares.partial, take=take)


class RotatedSquares:
    """The running sums over samples of squared per-sample gradients, rotated into the eigenbasis of the factors.

    Takes the same samples as the factors, a second time.
    """

    def __init__(self, factors: KroneckerFactors) -> None:
        """Raises ValueError if the factors are not finite and so have no eigenvectors."""
        finite(factors.curvature())
        self.factors = factors
        self.samples = 0
        self._bases: dict[str, Factors] = {}
        moments = {}
        for name, matrix in factors.factors().items():
            outputs, inputs = (_eigenvectors(side) for side in (matrix.outputs, matrix.inputs))
            dtype = factors.parameters[name].dtype
            bases = Factors(outputs.to(dtype), inputs.to(dtype))
            self._bases[name] = bases
            moments[name] = bases.inputs.new_zeros(len(bases.outputs), len(bases.inputs))
        self._moments = Sums(moments)

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples, as `SquaredGradients.add` does."""
        self.samples += len(inputs)
        for rows in even_slices(len(inputs), self.factors.at_a_time(passes)):
            self._add(inputs[rows], partial(vectors, rows))
        self._moments.close_batch()

    def curvature(self) -> Kronecker:
        """The means over samples, in the parameters' own precision."""
        means = self._moments.over(self.samples)
        blocks = [
            Block(Rotated(bases.outputs, bases.inputs, means[name].to(bases.inputs)), self.factors.layers[name].shapes)
            for name, bases in self._bases.items()
        ]
        return Kronecker(tuple(blocks), self.factors.rest())

    def _add(self, inputs: Tensor, vectors: Vectors) -> None:
        taps = Taps(self.factors.model, inputs)
        outputs = vectors(taps.logits.detach())
        rotated: dict[Use, Linear] = {}  # position by position, every layer is linear
        totals = self._moments.partial
        for use in taps.uses:
            if (layer := self.factors.layer(use)) is not None:
                name = use.names["weight"]
                rotated[use] = Linear({"weight": name}, layer.rows(use) @ self._bases[name].inputs)
                rotated[use].passes = outputs.shape[1]

        def receive(use: Use, gradient: Tensor) -> None:
            if (layer := self.factors.layer(use)) is not None:
                rows = layer.gradient_rows(use, gradient) @ self._bases[use.names["weight"]].outputs
                rotated[use].add_squares(rows, totals)

        for index, vector in enumerate(outputs.unbind(1)):
            taps.backward(vector, receive, last=index == outputs.shape[1] - 1)
            for use in rotated.values():
                use.flush(totals)
        for use in rotated.values():
            use.close(totals)


def _not_held(reason: str) -> ConfigError:
    return ConfigError("fisher.representation", f"expected diagonal or full for this model, since {reason}")


def _has_factors(use: Use) -> bool:
    if isinstance(use, Convolution) and (use.call.groups > 1 or use.call.weight.dim() != 4):
        return False
    return isinstance(use, (Linear, Convolution)) and "weight" in use.names


def _add_input_products(total: Tensor, use: Use, layer: Layer) -> None:
    """Add the mean over positions of a aᵀ, summed over samples, to `total` [K, K]."""
    room = CACHE if total.device.type == "cpu" else ROOM
    for some in slices(len(use.inputs), layer.positions * layer.inputs, room):
        rows = layer.rows(use, some).flatten(0, 1)
        total.addmm_(rows.t(), rows, alpha=1 / layer.positions)


def _eigenvectors(matrix: Tensor) -> Tensor:
    """The eigenvectors of `matrix`, as columns."""
    return torch.linalg.eigh(matrix.cpu() if matrix.device.type == "mps" else matrix).eigenvectors.to(matrix.device)


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Kronecker, Block, Factors, Rotated])
