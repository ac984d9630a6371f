"""Statistics over a handful of seeds: mean, standard deviation, standard error, Student's 95 % interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Summary:
    """Statistics of n values. Spread and interval of a single value are NaN; so is everything for no values."""

    n: int
    mean: float
    std: float  # of the sample: n - 1 in the denominator
    sem: float  # standard error of the mean
    low: float  # the 95 % interval of the mean
    high: float

    def half(self, spread: str) -> float:
        """The half-width drawn on either side of the mean: std, sem, or half of the interval."""
        return {"std": self.std, "sem": self.sem, "interval": self.high - self.mean}[spread]


def summarise(values: Sequence[float | None]) -> Summary:
    """The summary of the values that are not None, which stands for not measured."""
    known = [value for value in values if value is not None]
    n = len(known)
    mean = math.fsum(known) / n if n else math.nan
    if n < 2:
        return Summary(n, mean, math.nan, math.nan, math.nan, math.nan)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
    sem = std / math.sqrt(n)
    half = t_quantile(n - 1) * sem
    return Summary(n, mean, std, sem, mean - half, mean + half)


def paired_difference(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Summary:
    """The summary of value minus baseline, seed by seed, over the seeds that both have."""
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values.keys() & baseline.keys())]
    return summarise([one - other for one, other in pairs if one is not None and other is not None])


def t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = LEVEL, for Student's T with `freedom` >= 1 degrees of freedom."""
    from scipy.special import stdtrit  # slow to import, and one seed has no interval

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def mean_of_matrices(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Entry-wise mean, [T, T]; NaN where any matrix has NaN: a mean of fewer seeds would not be comparable."""
    return np.mean(np.stack(matrices), axis=0)


def over_tasks(matrices: Sequence[np.ndarray], before: int = 0) -> np.ndarray:
    """[seeds, T]: the mean of each row over the tasks learned by then, without the last `before` of them.

    NaN if any of these entries was not measured, or if there are none.
    """
    stack = np.stack(matrices)
    ends = range(1 - before, stack.shape[1] + 1 - before)
    nothing = np.full(len(stack), np.nan)
    return np.stack([stack[:, row, :end].mean(axis=1) if end > 0 else nothing for row, end in enumerate(ends)], axis=1)
