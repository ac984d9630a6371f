"""Sums of squared per-sample gradients: by taps where every parameter has a rule, otherwise by `vmap` or a loop."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.fisher.curvature import Diagonal
from cl_runner.gradients.kernels import Precision
from cl_runner.gradients.layers import Uncovered
from cl_runner.gradients.passes import SlicedVectors, Vectors, add_tapped_squares, zeros
from cl_runner.gradients.trial import choose_way, refuse_batch_dependence
from cl_runner.models.model import Classifier, Parameters, trainable

OUTPUT_NUMBERS = 1 << 24  # numbers in the output vectors held at a time
FOLD = 32  # batches summed in the parameters' precision before they are added to the wide sum


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, uncompiled, with full-precision matrix products; afterwards restore every module's mode and
    every buffer, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        model.eval()
        with _uncompiled(), _full_precision():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, content in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, content):  # an expanded buffer cannot be written to, and does not change
                buffer.copy_(content)


def wide(values: Tensor, copy: bool = False) -> Tensor:
    """`values` in float64, where the device has it; always a new tensor if `copy`."""
    return values.to(values.dtype if values.device.type == "mps" else torch.float64, copy=copy)


def _uncompiled() -> AbstractContextManager:
    """Run a compiled backbone's original code: compiled code cannot be intercepted."""
    # Setting the stance would import the compiler, which takes seconds; if it is not imported, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turn tf32 off: squaring doubles the relative error of the gradients, so what training tolerates is too much."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class Sums:
    """Sums of very many terms: a few batches in the parameters' precision, which are then added to wide sums."""

    def __init__(self, zeros: Parameters) -> None:
        """`zeros`: becomes `partial`, to be added to in place."""
        self.partial = zeros
        self._wide: Parameters = {}
        self._batches = 0

    def close_batch(self) -> None:
        self._batches += 1
        if self._batches == FOLD:
            self._fold()

    def over(self, count: int) -> Parameters:
        """The wide sums, divided by `count`."""
        self._fold()
        return {name: values / max(1, count) for name, values in self._wide.items()}

    def _fold(self) -> None:
        """Add the partial sums to the wide ones: sixty thousand additions in float32 would cost the fifth digit."""
        self._batches = 0
        for name, values in self.partial.items():
            known = self._wide.get(name)
            self._wide[name] = wide(values, copy=True) if known is None else known.add_(values)
            values.zero_()


class MeasuredGradients:
    """The running sum over samples of Σ_v m(vᵀ ∂z/∂θ), z a sample's logits, v its output vectors, m a measure.

    It covers every trainable parameter, under its name in `model`; what no vector reaches gets zeros. The live
    parameters are not touched, nor their `.grad` or `requires_grad`.

    samples: how many have been added.
    """

    def __init__(self, model: Classifier, tapped: Callable[..., None]) -> None:
        """`tapped`: adds a batch's measures by taps. Called without `options` it adds squares, which the trial checks.

        Raises ValueError, naming the layer, for a model whose answer to a sample depends on the rest of the batch.
        """
        refuse_batch_dependence(model)
        self.model = model
        self.samples = 0
        self._parameters = trainable(model)
        self._sums = Sums(zeros(model))
        self._tapped = tapped
        self._way: Callable[..., None] | None = None

    def add(self, inputs: Tensor, passes: int, vectors: SlicedVectors) -> None:
        """Add a batch's samples.

        Args:
            inputs: [B, C, H, W] float, preprocessed.
            passes: V, the most vectors per sample.
            vectors: (a slice of the batch, its logits [b, K]) -> its output vectors [b, V, K]; called for a few samples
                at a time, since a whole batch of them can be larger than the model (V = K = 1000).
        """
        self.samples += len(inputs)
        if not self._parameters:
            return
        if self._way is None:
            self._way = choose_way(self.model, inputs, self._tapped)
        for rows in self.slices(len(inputs), passes):
            some = inputs[rows], partial(vectors, rows)
            try:
                self._add(self._way, *some)
            # Raised in the forward pass, before anything was added: this batch takes another path through the model,
            # although its first and last image alone may not.
            except Uncovered as uncovered:
                self._way = choose_way(self.model, some[0], self._tapped, str(uncovered))
                self._add(self._way, *some)
        self._sums.close_batch()

    def options(self, way: Callable[..., None]) -> dict[str, Any]:
        """Further arguments for `way`, except in its trial."""
        return {}

    def slices(self, length: int, passes: int) -> Iterator[slice]:
        """Parts of a batch that are small enough to be added at once."""
        most = max(1, OUTPUT_NUMBERS // max(1, passes * self.model.head.out_features))
        for start in range(0, length, most):
            yield slice(start, min(start + most, length))

    def curvature(self) -> Diagonal:
        """The mean over samples, in the parameters' own precision and layout."""
        means = self._sums.over(self.samples)
        # Popped one by one: holding all in both precisions would be a call's memory peak.
        return Diagonal({name: torch.empty_like(p).copy_(means.pop(name)) for name, p in self._parameters.items()})

    def _add(self, way: Callable[..., None], inputs: Tensor, vectors: Vectors) -> None:
        way(self.model, self._sums.partial, inputs, vectors, **self.options(way))


class SquaredGradients(MeasuredGradients):
    """The running sum over samples of Σ_v (vᵀ ∂z/∂θ)²."""

    def __init__(self, model: Classifier, *, precision: Precision = "fp32") -> None:
        """`precision`: of the weight side only; the forward pass and the activations keep theirs."""
        super().__init__(model, add_tapped_squares)
        self.precision: Precision = precision

    def options(self, way: Callable[..., None]) -> dict[str, Any]:
        return {"precision": self.precision} if way is add_tapped_squares else {}
