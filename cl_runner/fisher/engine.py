"""Squared per-sample gradients, summed: by taps where every parameter has a rule, by `vmap` or a loop where not."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from cl_runner.fisher.curvature import Diagonal, Parameters
from cl_runner.fisher.graphs import Replayed, side_stream
from cl_runner.fisher.kernels import Precision
from cl_runner.fisher.layers import Uncovered, Use
from cl_runner.fisher.per_sample import add_looped_squares, add_vmapped_squares
from cl_runner.fisher.taps import Taps
from cl_runner.models.model import Model, PretrainedView

log = logging.getLogger("cl_runner")

Vectors = Callable[[Tensor], Tensor]

VECTORS = 1 << 24  # numbers in the output vectors that are held at a time
SHARED = 1 << 26  # numbers in the gradients that are held at a time, where a parameter is used twice
BLOCK = 4  # passes that a kernel takes together, and a CUDA graph
FOLD = 32  # batches that are summed in the parameters' precision before they join the wide sum
ALIKE = 1e-3  # how far squares may be from autograd's, on two images, in relation to their norm
NOISE = 1e-6  # ... and in relation to the largest norm in the same module
SAME = 1e-2  # how far logits of the same image may be from each other


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and nothing compiled; afterwards every module's mode and every buffer is as it was, whatever
    happened."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        model.eval()
        with _uncompiled():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, content in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, content):  # an expanded buffer cannot be written to, and does not change
                buffer.copy_(content)


def wide(values: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


def _uncompiled() -> AbstractContextManager:
    """A compiled backbone would let nothing in between; the code that it was made of does."""
    # Setting the stance would import the compiler, which takes seconds: what has not been imported compiled nothing.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Sums:
    """Sums of very many terms: of some batches in the parameters' precision, which then join wide ones."""

    def __init__(self, zeros: Parameters) -> None:
        """`zeros`: to be added to in place, as `partial`."""
        self.partial = zeros
        self._wide: Parameters = {}
        self._batches = 0

    def close_batch(self) -> None:
        self._batches += 1
        if self._batches == FOLD:
            self._fold()

    def over(self, count: int) -> Parameters:
        """The sums over `count`, wide."""
        self._fold()
        return {name: values / max(1, count) for name, values in self._wide.items()}

    def _fold(self) -> None:
        """Sixty thousand additions in float32 would cost the fifth digit."""
        self._batches = 0
        for name, values in self.partial.items():
            sums = wide(values)
            self._wide[name] = self._wide[name].add_(sums) if name in self._wide else sums.clone()
            values.zero_()


class SquaredGradients:
    """The running sum over samples of Σ_v (vᵀ ∂z/∂θ)², z a sample's logits and v its output vectors.

    Every trainable parameter takes part, by the name it has in `model`; what a vector does not reach gets zeros. The
    live parameters are not touched, nor their `.grad` or `requires_grad`.

    samples: how many were added.
    passes: backward passes so far, one for each sample and vector.
    """

    def __init__(self, model: Model | PretrainedView, *, precision: Precision = "fp32") -> None:
        """`precision`: of the weight side alone; the forward pass and the activations stay as they are.

        Raises ValueError, which names the layer, for a model whose samples do not stand for themselves.
        """
        refuse_batch_dependence(model)
        self.model = model
        self.precision: Precision = precision
        self.samples, self.passes = 0, 0
        self._parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._sums = Sums(_zeros(model))
        self._add: _Adds | None = None

    def add(self, inputs: Tensor, passes: int, vectors: Callable[[slice, Tensor], Tensor]) -> None:
        """Add a batch's samples.

        Args:
            inputs: [B, C, H, W] float, preprocessed.
            passes: V, the vectors a sample, at most.
            vectors: (a slice of the batch, its logits [b, K]) -> its output vectors [b, V, K]; asked for a few samples
                at a time, since those of a whole batch can be larger than the model (V = K = 1000).
        """
        self.samples += len(inputs)
        if not self._parameters:
            return
        if self._add is None:
            self._add = _way(self.model, inputs, self.precision)
        most = max(1, VECTORS // max(1, passes * self.model.head.out_features))
        for start in range(0, len(inputs), most):
            rows = slice(start, min(start + most, len(inputs)))
            self._add(self.model, self._sums.partial, inputs[rows], partial(self._counted, vectors, rows))
        self._sums.close_batch()

    def curvature(self) -> Diagonal:
        """The sums over the number of samples, in the parameters' own precision and layout."""
        means = self._sums.over(self.samples)
        return Diagonal({name: torch.empty_like(p).copy_(means[name]) for name, p in self._parameters.items()})

    def _counted(self, vectors: Callable[[slice, Tensor], Tensor], rows: slice, logits: Tensor) -> Tensor:
        found = vectors(rows, logits)
        self.passes += found.shape[0] * found.shape[1]
        return found


class _Adds(Protocol):
    """Adds Σ_v (vᵀ ∂z/∂θ)², summed over `inputs` [B, ...], to `totals` in place; `vectors`: logits -> [B, V, K]."""

    def __call__(self, model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors) -> None: ...


def add_tapped_squares(
    model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, precision: Precision = "fp32"
) -> None:
    """One forward pass, and a backward pass a vector that is taken apart at the layers' outputs."""
    with side_stream(inputs.device):
        _add_tapped_squares(model, totals, inputs, vectors, precision)


def _add_tapped_squares(
    model: Model | PretrainedView, totals: Parameters, inputs: Tensor, vectors: Vectors, precision: Precision
) -> None:
    taps = Taps(model, inputs)
    outputs = vectors(taps.logits.detach())
    shared = shared_parameters(taps)
    numbers = len(inputs) * sum(totals[name].numel() for name in shared)
    if numbers > SHARED and len(inputs) > 1:
        for half in (slice(None, len(inputs) // 2), slice(len(inputs) // 2, None)):
            _add_tapped_squares(model, totals, inputs[half], lambda _, half=half: outputs[half], precision)
        return
    add_passes(taps, outputs, totals, precision)


def shared_parameters(taps: Taps) -> set[str]:
    """Those that are used more than once: their gradients are to be summed before they are squared."""
    calls = Counter(name for use in taps.uses for name in use.names.values())
    return {name for name, count in calls.items() if count > 1}


def add_passes(
    taps: Taps,
    outputs: Tensor,
    totals: Parameters,
    precision: Precision = "fp32",
    take: Callable[[Use, Tensor], bool] = lambda use, gradient: False,
) -> None:
    """Make a backward pass for each of the `outputs` [B, V, K], and add the squares to `totals` in place.

    `take`: (a use, its output's gradient) -> whether something else was done with it, so that nothing is added.
    """
    shared = shared_parameters(taps)
    summed: Parameters = {}

    def receive(use: Use, gradient: Tensor) -> None:
        if take(use, gradient):
            return
        if shared.isdisjoint(use.names.values()):
            use.add_squares(gradient, totals)
            return
        for name, values in use.per_sample(gradient).items():
            flat = values.flatten(1)
            summed[name] = summed[name] + flat if name in summed else flat

    def block(some: Tensor, last: bool = False) -> None:
        """The passes of `some` vectors [B, v, K]."""
        for index, vector in enumerate(some.unbind(1), start=1):
            taps.backward(vector, receive, last and index == some.shape[1])
            for name, values in summed.items():  # all of a parameter's calls have come: now they may be squared
                totals[name] += values.square().sum(0).view_as(totals[name])
            summed.clear()
        for use in taps.uses:
            use.flush(totals)

    for use in taps.uses:
        use.passes, use.precision = outputs.shape[1], precision
    *repeated, last = outputs.split(BLOCK, dim=1)
    run = block if any(use.waits for use in taps.uses) else Replayed(block, outputs[:, :BLOCK])
    for some in repeated:
        run(some)
    block(last, last=True)
    for use in taps.uses:
        use.close(totals)


def _way(model: Model | PretrainedView, inputs: Tensor, precision: Precision) -> _Adds:
    """How this model's squares are computed: the fastest way that agrees with plain autograd on two images."""
    pair = inputs[[0, -1]]
    reason = objection(model, pair)
    if reason is None:
        return partial(add_tapped_squares, precision=precision)
    refuse_dependence(model, pair)
    further = objection(model, pair, add_vmapped_squares)
    if further is None:
        _say_once("by vmap, which is slower", reason)
        return add_vmapped_squares
    _say_once("sample by sample, which is much slower", f"{reason}; by vmap, {further}")
    return add_looped_squares


# What a model's own code raises where it does not bear what stands between it and plain autograd.
FAILURES = (RuntimeError, TypeError, IndexError)


def objection(model: Model | PretrainedView, inputs: Tensor, way: _Adds = add_tapped_squares) -> str | None:
    """Why `way` does not serve this model, if it does not: it is compared with plain autograd on `inputs`."""
    found, expected = _zeros(model), _zeros(model)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(inputs), 1, model.head.out_features, generator=generator).to(inputs)
    add_looped_squares(model, expected, inputs, lambda _: vectors)
    try:
        way(model, found, inputs, lambda _: vectors)
    except Uncovered as uncovered:
        return str(uncovered)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    norms = {name: float(values.norm()) for name, values in expected.items()}
    for name, values in expected.items():
        # A gradient that is zero but for rounding, as that of an attention's key bias, says nothing by itself. It is
        # told by its own module's others: a whole block can have tiny gradients, behind a layer's small scale.
        module = name.rpartition(".")[0]
        noise = NOISE * max(norm for other, norm in norms.items() if other.rpartition(".")[0] == module)
        missing = bool(values.any()) and not found[name].any()
        if missing or not float((found[name] - values).norm()) <= ALIKE * norms[name] + noise:
            return f"{name} takes part in a way that has no rule"
    return None


def _zeros(model: Model | PretrainedView) -> Parameters:
    """For every trainable parameter; contiguous, whatever the parameter's layout: a weight is a matrix here."""
    return {
        name: torch.zeros(p.shape, dtype=p.dtype, device=p.device)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@lru_cache
def _say_once(way: str, reason: str) -> None:
    log.warning("the Fisher of this model is computed %s: %s", way, reason)


def refuse_batch_dependence(model: nn.Module) -> None:
    """Raises ValueError for a layer that, in eval mode, still looks at the whole batch, or draws."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _NormBase) and "Batch" in kind and (module.training or module.running_mean is None):
            raise ValueError(
                f"the Fisher needs each sample's own gradient, and {name} ({kind}) normalises by the statistics of its "
                "batch; only fisher=batched with train_mode takes it as it is"
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"the Fisher needs one answer a sample, and {name} ({kind}) drops out in eval mode too")


def refuse_dependence(model: Model | PretrainedView, inputs: Tensor) -> None:
    """Raises ValueError where the logits of `inputs` [B, C, H, W] depend on who else is in the batch, or on chance."""
    with torch.no_grad():
        together = model.encode(inputs).logits
        alone = torch.cat([model.encode(image).logits for image in inputs.split(1)])
    if float((together - alone).norm()) > SAME * float(alone.norm()):
        raise ValueError(
            "the Fisher needs each sample's own gradient, and in eval mode too this model's answer depends on "
            "the other samples of its batch, or on chance"
        )
