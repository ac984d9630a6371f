"""How a model's per-sample gradients are computed: the fastest way that agrees with plain autograd on two images."""

import logging
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from cl_runner.gradients.fallbacks import add_looped, add_vmapped
from cl_runner.gradients.layers import BatchStatisticsError, DependenceError, Uncovered
from cl_runner.gradients.passes import AddsSquares, add_tapped_squares, zeros
from cl_runner.models.model import Classifier

log = logging.getLogger("cl_runner")

ALIKE = 1e-3  # how far squares may be from autograd's on two images, relative to their norm
NOISE = 1e-6  # ... plus this, relative to the largest norm in the same module
SAME = 1e-2  # how far two logits of the same image may be apart, relative to their norm


def choose_way(
    model: Classifier, inputs: Tensor, tapped: Callable[..., None], reason: str | None = None
) -> Callable[..., None]:
    """The fastest way to sum this model's per-sample gradients whose squares agree with plain autograd's on two images:
    `tapped`, `add_vmapped` or `add_looped`.

    `reason`: why it cannot be `tapped`, where that is known already.
    """
    pair = inputs[[0, -1]]
    reason = reason or disagreement(model, pair, tapped)
    if reason is None:
        return tapped
    refuse_dependence(model, pair)
    further = disagreement(model, pair, add_vmapped)
    if further is None:
        _say_once("by vmap, which is slower", reason)
        return add_vmapped
    _say_once("sample by sample, which is much slower", f"{reason}; by vmap, {further}")
    return add_looped


# What a model's own code may raise when something other than plain autograd runs it.
FAILURES = (RuntimeError, TypeError, IndexError)


def disagreement(model: Classifier, inputs: Tensor, way: AddsSquares = add_tapped_squares) -> str | None:
    """Why `way` does not work for this model, or None if it agrees with plain autograd on `inputs`."""
    found, expected = zeros(model), zeros(model)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(inputs), 1, model.head.out_features, generator=generator).to(inputs)
    add_looped(model, expected, inputs, lambda _: vectors)
    sums = {name: float(values.sum()) for name, values in expected.items()}
    for name, values in sums.items():
        if not math.isfinite(values):
            raise ValueError(f"expected finite gradients, got non-finite ones for {name}: the model has diverged")
    try:
        way(model, found, inputs, lambda _: vectors)
    except Uncovered as uncovered:
        return str(uncovered)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    norms = {name: float(values.norm()) for name, values in expected.items()}
    for name, values in expected.items():
        # A gradient that is zero but for rounding, such as that of an attention's key bias, says nothing. It is
        # recognised within its own module, since behind a small layer scale a whole block can have tiny gradients.
        module = name.rpartition(".")[0]
        noise = NOISE * max(norm for other, norm in norms.items() if other.rpartition(".")[0] == module)
        missing = sums[name] > 0 and not found[name].any()
        if missing or not float(found[name].sub_(values).norm()) <= ALIKE * norms[name] + noise:
            return f"{name} is used in a way that no rule covers"
    return None


@lru_cache
def _say_once(way: str, reason: str) -> None:
    log.warning("per-sample gradients of this model are computed %s: %s", way, reason)


def refuse_batch_dependence(model: nn.Module) -> None:
    """Raises DependenceError for a layer that even in eval mode depends on the whole batch, or on chance."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _NormBase) and "Batch" in kind and (module.training or module.running_mean is None):
            raise BatchStatisticsError(f"in which {name} ({kind}) normalises by the statistics of its batch")
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise DependenceError(f"in which {name} ({kind}) stays active in eval mode")


def refuse_dependence(model: Classifier, inputs: Tensor) -> None:
    """Raises DependenceError where logits of `inputs` [B, C, H, W] depend on the rest of the batch, or on chance."""
    with torch.no_grad():
        together = model.encode(inputs).logits
        alone = torch.cat([model.encode(image).logits for image in inputs.split(1)])
    if float((together - alone).norm()) > SAME * float(alone.norm()):
        raise DependenceError("whose answer depends on the other samples of its batch or on chance, even in eval mode")
