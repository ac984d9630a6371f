"""Squared per-sample gradients by taps: one forward pass per batch, and one backward pass per vector."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cl_runner.gradients.graphs import Replayed, side_stream
from cl_runner.gradients.kernels import Precision
from cl_runner.gradients.layers import Use
from cl_runner.gradients.taps import Taps
from cl_runner.models.model import Classifier, Parameters, trainable

SHARED = 1 << 26  # numbers in the gradients of parameters used more than once that are held at a time
TOGETHER = 4  # passes that a kernel, and a CUDA graph, takes together

Vectors = Callable[[Tensor], Tensor]  # logits [B, K] -> output vectors [B, V, K]
SlicedVectors = Callable[[slice, Tensor], Tensor]  # a slice of a batch, its logits [b, K] -> its vectors [b, V, K]


class AddsSquares(Protocol):
    """Adds Σ_v (vᵀ ∂z/∂θ)², summed over `inputs` [B, ...], to `totals` in place; `vectors`: logits -> [B, V, K]."""

    def __call__(self, model: Classifier, totals: Parameters, inputs: Tensor, vectors: Vectors) -> None: ...


def add_tapped_squares(
    model: Classifier, totals: Parameters, inputs: Tensor, vectors: Vectors, precision: Precision = "fp32"
) -> None:
    """Add squares by one forward pass, and one backward pass per vector that is intercepted at the layers' outputs."""
    with side_stream(inputs.device):
        _add_tapped_squares(model, totals, inputs, vectors, precision)


def _add_tapped_squares(
    model: Classifier, totals: Parameters, inputs: Tensor, vectors: Vectors, precision: Precision
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
    """Names of parameters used more than once, whose gradients must be summed before they are squared."""
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

    `take`: (a use, its output's gradient) -> whether it has dealt with this use, so that nothing is added.
    """
    shared = shared_parameters(taps)
    summed: Parameters = {}
    final = False  # whether this is the last pass

    def receive(use: Use, gradient: Tensor) -> None:
        if take(use, gradient):
            return
        if shared.isdisjoint(use.names.values()):
            use.add_squares(gradient, totals)
            if final:
                use.flush(totals)
                use.close(totals)
                use.release()
            return
        for name, values in use.per_sample(gradient).items():
            flat = values.flatten(1)
            summed[name] = summed[name] + flat if name in summed else flat

    def block(some: Tensor, last: bool = False) -> None:
        """Make the passes for `some` vectors [B, v, K]."""
        nonlocal final
        for index, vector in enumerate(some.unbind(1), start=1):
            final = last and index == some.shape[1]
            taps.backward(vector, receive, final)
            for name, values in summed.items():  # complete now that all of the parameter's calls have contributed
                totals[name] += values.square().sum(0).view_as(totals[name])
            summed.clear()
        for use in taps.uses:
            use.flush(totals)

    def forget() -> None:
        summed.clear()
        for use in taps.uses:
            use.forget()

    for use in taps.uses:
        use.passes, use.precision = outputs.shape[1], precision
    *repeated, last = outputs.split(TOGETHER, dim=1)
    # A capture costs about as much as a block, and the first block is run as it is.
    pays = len(repeated) > 2 and not any(use.waits for use in taps.uses)
    run = Replayed(block, outputs[:, :TOGETHER], forget) if pays else block
    for some in repeated:
        run(some)
    block(last, last=True)


def zeros(model: Classifier) -> Parameters:
    """Zeros for every trainable parameter; contiguous whatever the parameter's layout: weights are matrices here."""
    return {name: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for name, p in trainable(model).items()}
