"""The estimators to measure, and float64 loops that compute what each should give."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from cl_runner.fisher import reference
from cl_runner.fisher.batched import Batched
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Argmax, Empirical, Exact, Probe, Reversed, Sampled
from cl_runner.fisher.hybrid import Hybrid
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples

ESTIMATORS: dict[str, type[Any]] = {
    "exact": Exact,
    "hybrid": Hybrid,
    "probe": Probe,
    "sampled": Sampled,
    "empirical": Empirical,
    "argmax": Argmax,
    "reversed": Reversed,
    "batched": Batched,
}
UNDEFINED = ("hybrid",)  # plans by the logits, which differ in float64; unbiased, so compared with `exact`
CALLS = 20  # whose mean is compared, since one is mostly noise


def with_draws(estimator: Any, draws: int) -> Any:
    """The estimator with this number of draws, if it draws."""
    return replace(estimator, draws=draws) if "draws" in {field.name for field in fields(estimator)} else estimator


def mean_of(calls: int, call: Callable[[int], Diagonal]) -> Diagonal:
    """The mean of `call(0)`, `call(1)`, ..."""
    total = call(0)
    for number in range(1, calls):
        total = total.plus(call(number))
    return total.scaled(1 / calls)


def defined(name: str, estimator: Any, model: Model, examples: Examples) -> Diagonal:
    """What `estimator` should give by its definition: a float64 loop with the same noise."""
    if name in UNDEFINED:
        return reference.exact(model, examples)
    definition: Callable[..., Diagonal] = getattr(reference, name)
    drawn: dict[str, Any] = {}
    if name in ("sampled", "probe"):
        generator = torch.Generator().manual_seed(estimator.seed_for(examples))
        noise = estimator.noise(len(examples), len(model.revealed), generator).to(model.device)
        drawn = {"clocks": noise} if name == "sampled" else {"signs": noise}
    elif name == "batched":
        drawn = {"batch_size": estimator.batch_size}
    return definition(model, examples, **drawn)


def in_float64(model: Model) -> Model:
    return copy.deepcopy(model).double()


def error(found: Diagonal, expected: Diagonal) -> float:
    """|found - expected| / |expected| over all of `found`'s parameters together; infinite if shapes differ."""
    difference = size = 0.0
    for name, values in found.values.items():
        wanted = expected.values[name].double()
        if values.shape != wanted.shape:
            return float("inf")
        difference += float((values.double() - wanted).square().sum())
        size += float(wanted.square().sum())
    return (difference / size) ** 0.5 if size else float("nan")
