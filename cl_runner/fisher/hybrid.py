"""The Fisher from the heaviest vectors one by one, and from random signs for all the others together.

For one sample with probabilities p, diag(p) - p pᵀ = Σ_c v_c v_cᵀ with the columns v_c = √p_c (e_c - p). A column's
weight is |v_c|² = p_c (1 - 2 p_c + |p|²), its part of the trace. The better a model fits its data, the fewer columns of
the fewer samples hold nearly all of the weight.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from cl_runner.fisher.engine import wide
from cl_runner.fisher.estimators import Estimator, exact_vectors
from cl_runner.gradients.passes import SlicedVectors
from cl_runner.models.model import Classifier
from cl_runner.streams.base import Examples

HALVINGS = 40  # of the interval that is searched for a threshold, in its logarithm
MIXED = 1.25  # how many times as many passes as another of its batch a sample may need; the other gets zero vectors
LEAST = 1e-30  # threshold that keeps every column with a gradient distinguishable from zero in float32


@dataclass(frozen=True)
class Columns:
    """The columns √p_c (e_c - p) of N samples."""

    outputs: Tensor  # [N], how many are active
    p: Tensor  # [N, K]
    weights: Tensor  # [N, K], their squared lengths

    @staticmethod
    def of(logits: Tensor) -> "Columns":
        """From `logits` [N, K], -inf where inactive."""
        p = wide(logits).softmax(1)
        weights = (p * (1 - 2 * p + p.square().sum(1, keepdim=True))).clamp_min(0)
        return Columns((logits != -torch.inf).sum(1), p, weights)


@dataclass(frozen=True)
class Plan:
    """How the columns of N samples are treated."""

    heavy: Tensor  # [N, K] bool, columns that are taken exactly
    rates: Tensor  # [N], expected number of probes for the others
    whole: Tensor  # [N] bool, samples that get Exact's vectors instead
    outputs: Tensor  # [N], how many are active

    @staticmethod
    def of(columns: Columns, threshold: Tensor | float) -> "Plan":
        """`threshold`: one number, or one per sample [N, 1]."""
        heavy = columns.weights >= threshold
        rates = (columns.weights.masked_fill(heavy, 0) / threshold).sum(1)
        return Plan(heavy, rates, heavy.sum(1) + rates >= columns.outputs - 1, columns.outputs)


@dataclass(frozen=True)
class Draws:
    """The random draws, on the CPU and in the samples' own order, so that they do not depend on the batches."""

    dice: Tensor  # [N], uniform in [0, 1)
    probes: Tensor  # [N] int64, how many each sample has
    first: Tensor  # [N] int64, where each sample's rows of `signs` start
    signs: Tensor  # [Σ probes, K] int8, sample after sample

    @staticmethod
    def of(plan: Plan, generator: torch.Generator) -> "Draws":
        dice = torch.rand(len(plan.rates), generator=generator, dtype=torch.float64)
        probes = (plan.rates.cpu() + dice).floor().long() * ~plan.whole.cpu()
        shape = int(probes.sum()), plan.heavy.shape[1]
        signs = 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1
        return Draws(dice, probes, probes.cumsum(0) - probes, signs)


@dataclass(kw_only=True)
class Hybrid(Estimator):
    """Every column of weight τ or more exactly, a sample's others by random signs on all of them at once. Unbiased.

    If the others have a total weight of r, they get r/τ probes v = Σ_c ε_c v_c, ε_c = ±1, in expectation: ⌊r/τ + u⌋ of
    them, u uniform in [0, 1), each divided by √(their number); where r < τ, one probe with probability r/τ, divided by
    √(r/τ). So a sample takes Σ_c min(1, |v_c|²/τ) passes in expectation, and most samples of a confident model take
    none; a sample that would take as many as `Exact` gets Exact's vectors. A forward pass over all samples comes first,
    to find τ.

    Args:
        budget: expected backward passes per sample, averaged over samples. Exact wherever that is enough.
        tolerance: instead of a budget, the expected relative error of the output biases' Fisher: the only one known in
            advance, since the probabilities give it in closed form (J = 1). Other parameters' Fishers are mixtures of
            the same vectors, so their errors are of the same order, but may be larger: with 0.05, that of the whole
            diagonal was 0.089 on an MLP and 0.022 and 0.029 on a CNN. The report estimates the actual error.
    """

    budget: PositiveFloat = 1.0
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None

    # Not kfac: its factor of the inputs is a mean over all samples, but here most have no vectors and are skipped.
    representations = ("diagonal", "ekfac", "full")

    def passes(self, num_classes: int) -> int:
        """The most per sample. With a tolerance, all that is known in advance is Exact's number as an upper bound."""
        return min(num_classes - 1, math.ceil(self.budget) if self.tolerance is None else num_classes - 1)

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """`noise` [B, V, K]: the coefficients of the columns in each vector."""
        p = logits.softmax(1)[:, None]
        columns = noise * p.sqrt()
        return columns - p * columns.sum(2, keepdim=True)

    def prepared(self, model: Classifier, examples: Examples) -> Examples:
        """The samples with their active logits [N, K] and the threshold, repeated for each sample, as extras."""
        parts = []
        with torch.no_grad():
            for batch in examples.batches(self.batch_size):
                batch = batch.to(model.device)
                parts.append(self._entering(model, model(batch.images).logits, batch))
        logits = torch.cat(parts)
        columns = Columns.of(logits)
        if self.tolerance is None:
            threshold = threshold_for_budget(columns, self.budget)
        else:
            threshold = threshold_for_tolerance(columns, self.tolerance)
        extras = {"logits": logits, "threshold": wide(logits.new_ones(len(logits))) * threshold}
        return replace(examples, extras=extras)

    def by_chance(self, prepared: Examples) -> bool:
        plan = plan_of(prepared)
        return bool((~plan.whole & (plan.rates > 0)).any())

    def _batches(
        self, model: Classifier, prepared: Examples, generator: torch.Generator
    ) -> Iterator[tuple[Examples, int, SlicedVectors]]:
        plan = plan_of(prepared)
        draws = Draws.of(plan, generator)
        passes = torch.where(plan.whole, plan.outputs - 1, plan.heavy.sum(1) + draws.probes.to(plan.outputs)).cpu()
        for rows in _alike(plan.whole.cpu(), passes, self.batch_size):
            batch, most = prepared[rows].to(model.device), int(passes[rows].max())
            yield batch, most, partial(self._planned, plan, draws, rows, most, batch)

    def _planned(
        self, plan: Plan, draws: Draws, samples: Tensor, most: int, batch: Examples, rows: slice, _: Tensor
    ) -> Tensor:
        """Vectors from the logits that the plan was made for, since recomputed ones, rounded in another batch, might
        cross the threshold."""
        logits = batch.extras["logits"][rows]
        if plan.whole[samples[0]]:
            vectors = exact_vectors(wide(logits))
        else:
            amounts = _amounts(plan, draws, samples[rows], most)
            vectors = self.vectors(wide(logits), batch.labels[rows], amounts)
        return vectors.to(logits)


def expected_passes(columns: Columns, threshold: float) -> float:
    """Expected passes per sample, averaged over samples."""
    passes = (columns.weights / threshold).clamp_max(1).sum(1)
    return float(passes.minimum(columns.outputs - 1).mean())


def threshold_for_budget(columns: Columns, budget: float) -> float:
    """The smallest threshold that keeps the expected passes per sample within `budget`."""
    if expected_passes(columns, LEAST) <= budget:
        return LEAST
    high = float(columns.weights.sum()) / len(columns.p) / budget  # since min(1, w/τ) <= w/τ
    return _between(LEAST, high, lambda threshold: expected_passes(columns, threshold) <= budget)[1]


def threshold_for_tolerance(columns: Columns, tolerance: float) -> float:
    """The largest threshold that keeps the expected relative error of the output biases' Fisher within `tolerance`."""
    high = max(LEAST, float(columns.weights.sum()))  # one vector in all
    if bias_error(columns, high) <= tolerance:
        return high
    return _between(LEAST, high, lambda threshold: bias_error(columns, threshold) > tolerance)[0]


def bias_error(columns: Columns, threshold: float) -> float:
    """√(E|F̂ - F|² / |F|²) for F = mean over samples of p (1 - p), the output biases' Fisher.

    For one probe z = Σ_c ε_c a_c, E z² = Σ a² = q and E z⁴ = 3 q² - 2 Σ a⁴. A mean over k probes has the variance
    (E z⁴ - q²) / k; a probe kept with probability x and divided by √x has E z⁴ / x - q².
    """
    plan, p = Plan.of(columns, threshold), columns.p
    light = p * ~plan.heavy * ~plan.whole[:, None]
    # a = √p_c (δ_ck - p_k), for the output k and the light columns c.
    q = light * (1 - 2 * p) + p.square() * light.sum(1, keepdim=True)
    fourth = light * p * ((1 - p) ** 4 - p**4) + p**4 * light.square().sum(1, keepdim=True)
    rates = plan.rates.clamp_min(LEAST)[:, None]
    below = rates.floor().clamp_min(1)
    inverse = 1 / below - (rates - below) / (below * (below + 1))  # E 1/k
    moment = 3 * q.square() - 2 * fourth
    variance = torch.where(rates < 1, moment / rates - q.square(), (moment - q.square()) * inverse)
    fisher = (p * (1 - p)).sum(0)
    return float((variance.clamp_min(0).sum() / fisher.square().sum().clamp_min(LEAST)).sqrt())


def _between(low: float, high: float, above: Callable[[float], bool]) -> tuple[float, float]:
    """Bisect from `low`, where `above` is false, and `high`, where it is true, until the two are almost equal."""
    for _ in range(HALVINGS):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (low, middle) if above(middle) else (middle, high)
    return low, high


def plan_of(prepared: Examples) -> Plan:
    """The plan for what `Hybrid.prepared` returns."""
    return Plan.of(Columns.of(prepared.extras["logits"]), prepared.extras["threshold"][:, None])


def _alike(whole: Tensor, passes: Tensor, size: int) -> Iterator[Tensor]:
    """Groups of up to `size` samples with about the same number of vectors; those that use Exact's are kept apart.

    Samples without vectors are left out.
    """
    level = (passes.clamp_min(1).log() / math.log(MIXED)).floor()
    for kind in (whole, ~whole):
        chosen = kind & (passes > 0)
        for each in level[chosen].unique():
            yield from (chosen & (level == each)).nonzero()[:, 0].split(size)


def _amounts(plan: Plan, draws: Draws, rows: Tensor, most: int) -> Tensor:
    """The coefficients [B, V = `most`, K] of the columns in each vector of the samples `rows` [B].

    A sample's heavy columns come first, then its probes, then zeros.
    """
    heavy, rates, probes = plan.heavy[rows], plan.rates[rows, None], draws.probes[rows, None]
    vector = torch.arange(most)
    count = heavy.sum(1, keepdim=True).cpu()
    first = heavy.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    alone = F.one_hot(first, heavy.shape[1]) * (vector < count).to(heavy.device)[:, :, None]
    drawn = (vector >= count) & (vector < count + probes)
    signs = draws.signs.new_zeros(*drawn.shape, heavy.shape[1])
    signs[drawn] = draws.signs[(draws.first[rows, None] + vector - count)[drawn]]
    divisors = torch.where(rates < 1, rates, probes.to(rates)).clamp_min(LEAST).sqrt()
    return alone + signs.to(heavy.device) * ~heavy[:, None] / divisors[:, :, None]
