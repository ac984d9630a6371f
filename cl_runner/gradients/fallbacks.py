"""Per-sample gradients for models that the taps do not cover: by `torch.func`, or by a loop, which takes any model."""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from cl_runner.gradients.taps import ToLogits
from cl_runner.models.model import Classifier, Parameters, trainable
from cl_runner.models.substitute import nothing_kept, places

Measure = Callable[[Tensor], Tensor]  # elementwise, with measure(a b) = measure(a) measure(b)

# Numbers in all gradients of one vmap call together.
BUDGET = 64_000_000
# On the CPU, bytes for the largest parameter's gradients. Larger blocks are newly mapped by the operating system at
# every call, and page faults cost more than arithmetic: 0.45 against 1.04 ms per pass of an MLP, 31 against 68 of a
# ResNet-18.
CPU_BLOCK = 16_000_000


def add_vmapped(
    model: Classifier,
    totals: Parameters,
    inputs: Tensor,
    vectors: Callable[[Tensor], Tensor],
    measure: Measure = torch.square,
) -> None:
    """Add Σ_v measure(vᵀ ∂z/∂θ), summed over `inputs`, to `totals` in place; see `vmapped_gradients`."""
    vmapped_gradients(model, inputs, vectors, partial(_add, totals, measure))


def vmapped_gradients(
    model: Classifier,
    inputs: Tensor,
    vectors: Callable[[Tensor], Tensor],
    receive: Callable[[Parameters], None],
) -> None:
    """Pass vᵀ ∂z/∂θ to `receive` for every sample, vector and trainable parameter: by name, [b, V, ...] at a time.

    Under `vmap`, one forward pass per sample serves all its backward passes. `receive` must not write to its argument:
    vmap's results may alias.

    Args:
        inputs: [B, C, H, W] float, preprocessed.
        vectors: logits -> v [B, V, K].
    """
    logits = ToLogits(model)
    with torch.no_grad():
        all_vectors = vectors(logits(inputs))
    if all_vectors.shape[1] == 0:
        return
    live = trainable(model)
    names = {id(p): name for name, p in live.items()}
    parameters = {name: p.detach() for name, p in live.items()}
    places_of = {f"model.{place}": names[id(p)] for place, p in places(model).items() if id(p) in names}
    most = _most_gradients(parameters)

    def gradients(image: Tensor, outputs: Tensor) -> Parameters:
        """For one sample, `image` [C, H, W], `outputs` [V, K] -> [V, ...] for every parameter."""

        def answer(values: Parameters) -> Tensor:
            placed = {place: values[name] for place, name in places_of.items()}
            return functional_call(logits, placed, (image[None],), tie_weights=False)

        pull = vjp(answer, parameters)[1]
        return vmap(pull)(outputs[:, None])[0]

    for rows in even_slices(len(inputs), max(1, most // all_vectors.shape[1])):
        for some in all_vectors[rows].split(most, dim=1):
            with nothing_kept(model):
                found = _vmapped(gradients, inputs[rows], some)
            receive(found)


def add_looped(
    model: Classifier,
    totals: Parameters,
    inputs: Tensor,
    vectors: Callable[[Tensor], Tensor],
    measure: Measure = torch.square,
) -> None:
    """As `add_vmapped`, by plain autograd, one sample and one backward pass at a time."""
    looped_gradients(model, inputs, vectors, partial(_add, totals, measure))


def looped_gradients(
    model: Classifier,
    inputs: Tensor,
    vectors: Callable[[Tensor], Tensor],
    receive: Callable[[Parameters], None],
) -> None:
    """As `vmapped_gradients`, by plain autograd: one sample and one vector at a time, leaving out zero gradients."""
    parameters = trainable(model)
    with torch.no_grad():
        all_vectors = vectors(model.encode(inputs).logits)
    # Not `image[None]`: with its strides, PyTorch gets gradients of grouped convolutions in channels_last wrong.
    for image, some in zip(inputs.split(1), all_vectors, strict=True):
        with torch.enable_grad(), nothing_kept(model):
            logits = model.encode(image).logits
        for vector in some if logits.requires_grad else ():
            gradients = torch.autograd.grad(
                logits, list(parameters.values()), vector[None], retain_graph=True, allow_unused=True
            )
            found = zip(parameters, gradients, strict=True)
            receive({name: gradient[None, None] for name, gradient in found if gradient is not None})


def _vmapped(gradients: Callable[[Tensor, Tensor], Parameters], inputs: Tensor, vectors: Tensor) -> Parameters:
    with warnings.catch_warnings():
        # Pooling of channels_last images has no batching rule in vmap: slower, but correct, and no user can help it.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return vmap(gradients)(inputs, vectors)


def _most_gradients(parameters: Parameters) -> int:
    """How many gradients one vmap call may hold."""
    if not parameters:
        return 1
    most = BUDGET // max(1, sum(values.numel() for values in parameters.values()))
    if next(iter(parameters.values())).device.type == "cpu":
        most = min(most, CPU_BLOCK // max(1, max(values.nbytes for values in parameters.values())))
    return max(1, most)


def even_slices(length: int, most: int) -> Iterator[slice]:
    """The fewest slices none of which is longer than `most`, as equal as possible."""
    size = math.ceil(length / math.ceil(length / most))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _add(totals: Parameters, measure: Measure, gradients: Parameters) -> None:
    """Add the measure of `gradients`, [b, V, ...] each, to `totals`, summed over samples and vectors."""
    for name, values in gradients.items():
        rows, total = values.flatten(0, 1), totals[name]
        if measure is not torch.square or total.device.type != "cpu":
            total += measure(rows).sum(0)
            continue
        for row in rows:  # without a temporary of the gradients' size: 0.50 against 0.66 ms per pass of an MLP
            total.addcmul_(row, row)
