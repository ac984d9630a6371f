"""Squared per-sample gradients by taps: one forward pass of a batch, and a backward pass a vector."""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cl_runner.fisher.curvature import Parameters
from cl_runner.fisher.graphs import Replayed, side_stream
from cl_runner.fisher.kernels import Precision
from cl_runner.fisher.layers import Use
from cl_runner.fisher.taps import Taps
from cl_runner.models.model import Model, PretrainedView, trainable

SHARED = 1 << 26  # numbers in the gradients that are held at a time, where a parameter is used twice
TOGETHER = 4  # passes that a kernel takes together, and a CUDA graph

Vectors = Callable[[Tensor], Tensor]  # logits [B, K] -> output vectors [B, V, K]
SlicedVectors = Callable[[slice, Tensor], Tensor]  # a slice of a batch, its logits [b, K] -> its vectors [b, V, K]


class AddsSquares(Protocol):
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
    final = False  # whether no pass comes after this one

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
        """The passes of `some` vectors [B, v, K]."""
        nonlocal final
        for index, vector in enumerate(some.unbind(1), start=1):
            final = last and index == some.shape[1]
            taps.backward(vector, receive, final)
            for name, values in summed.items():  # all of a parameter's calls have come: now they may be squared
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
    run = block if any(use.waits for use in taps.uses) else Replayed(block, outputs[:, :TOGETHER], forget)
    for some in repeated:
        run(some)
    block(last, last=True)


def zeros(model: Model | PretrainedView) -> Parameters:
    """For every trainable parameter; contiguous, whatever the parameter's layout: a weight is a matrix here."""
    return {name: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for name, p in trainable(model).items()}
