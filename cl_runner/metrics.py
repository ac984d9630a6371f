"""Metrics of an accuracy matrix: how much was learned and how much was forgotten.

Every function takes the matrix A, float64 [T, T]: entry [i, j] is the accuracy on task j after learning task i, with
tasks counted from 0 and NaN where it was not measured. A metric that depends on a missing entry is NaN, so forgetting
and transfer are undefined for a single task and for joint training, whose matrix has its last row only.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

Matrix = np.ndarray


def average_accuracy(accuracy: Matrix) -> float:
    """Mean over all tasks after the last was learned: mean_j A[T-1, j].

    Source: Chaudhry et al., 2018, https://arxiv.org/abs/1801.10112.
    """
    return _mean(accuracy[-1])


def average_forgetting(accuracy: Matrix) -> float:
    """How far the tasks before the last fell from their best: mean_{j<T-1} (max_{j<=i<T-1} A[i, j] - A[T-1, j]).

    Negative if tasks ended better than they had ever been; never clipped.
    Source: Chaudhry et al., 2018, https://arxiv.org/abs/1801.10112; their maximum includes i < j, where task j has not
    been learned yet and nothing can be forgotten.
    """
    return _mean(forgetting_matrix(accuracy)[-1, :-1])


def backward_transfer(accuracy: Matrix) -> float:
    """The effect of learning later tasks on earlier ones: mean_{j<T-1} (A[T-1, j] - A[j, j]).

    Source: Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840.
    """
    return _mean((accuracy[-1] - accuracy.diagonal())[:-1])


def forward_transfer(accuracy: Matrix, zero_shot: Matrix) -> float:
    """The effect of earlier tasks on a task not learned yet: mean_{j>=1} (A[j-1, j] - zero_shot[j]).

    zero_shot: float64 [T], the accuracy on each task before any was learned.
    Undefined where a task brings its own outputs (scenarios task and class): before it nothing can be predicted.
    Source: Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840.
    """
    return _mean(accuracy.diagonal(1) - zero_shot[1:])


def learning_accuracy(accuracy: Matrix) -> float:
    """Accuracy on each task right after learning it: mean_j A[j, j].

    Source: Riemer et al., 2019, https://arxiv.org/abs/1810.11910.
    """
    return _mean(accuracy.diagonal())


def average_anytime_accuracy(accuracy: Matrix) -> float:
    """Average accuracy on the tasks seen so far, over the whole stream: mean_i mean_{j<=i} A[i, j].

    Source: Caccia et al., 2022, https://arxiv.org/abs/2104.05025, taken once a task; this is also the average
    incremental accuracy with tasks weighted alike.
    """
    return _mean([_mean(row[: i + 1]) for i, row in enumerate(accuracy)])


def overall_accuracy(accuracy: Matrix, sizes: Matrix) -> float:
    """Accuracy over the examples of all tasks after the last was learned: sum_j n_j A[T-1, j] / sum_j n_j.

    sizes: [T], the number of examples n_j of each task. Differs from the average accuracy if tasks differ in size.
    """
    return float((accuracy[-1] * sizes).sum() / sizes.sum())


def average_incremental_accuracy(accuracy: Matrix, sizes: Matrix) -> float:
    """Mean over the stream of the overall accuracy on the tasks seen so far: mean_i overall(A[i, :i+1]).

    Source: Rebuffi et al., 2017, https://arxiv.org/abs/1611.07725.
    """
    return _mean([overall_accuracy(row[None, : i + 1], sizes[: i + 1]) for i, row in enumerate(accuracy)])


def min_accuracy(lowest: Matrix) -> float:
    """How low the tasks before the last fell at any time since they were learned: mean_{j<T-1} lowest[j].

    lowest: float64 [T], each task's lowest accuracy over all evaluations since it was learned, within tasks too.
    Source: De Lange et al., 2023, https://arxiv.org/abs/2205.13452 (min-ACC), who evaluate after every step.
    """
    return _mean(lowest[:-1])


def worst_case_accuracy(accuracy: Matrix, lowest: Matrix) -> float:
    """The last task's accuracy, averaged with the lowest of all others: (A[T-1, T-1] + sum_{j<T-1} lowest[j]) / T.

    Source: De Lange et al., 2023, https://arxiv.org/abs/2205.13452 (WC-ACC).
    """
    return _mean([*lowest[:-1], accuracy[-1, -1]])


def forgetting_matrix(accuracy: Matrix) -> Matrix:
    """F [T, T]: how far task j has fallen after task i from its earlier best: max_{j<=k<i} A[k, j] - A[i, j].

    Defined below the diagonal, NaN elsewhere. Missing entries are left out of the maximum.
    """
    below = np.tril(np.ones_like(accuracy, dtype=bool), -1)
    learned = np.where(~below.T, np.nan_to_num(accuracy, nan=-np.inf), -np.inf)
    best = np.full_like(accuracy, -np.inf)
    best[1:] = np.maximum.accumulate(learned)[:-1]  # [i, j] = max_{j<=k<i} A[k, j]
    return np.where(below & np.isfinite(best), best - accuracy, np.nan)


def _mean(values: Iterable[float]) -> float:
    """NaN for no values."""
    known = np.asarray(values)
    return float(known.mean()) if known.size else math.nan


METRICS: dict[str, Callable[[Matrix], float]] = {
    "average_accuracy": average_accuracy,
    "average_forgetting": average_forgetting,
    "backward_transfer": backward_transfer,
    "learning_accuracy": learning_accuracy,
    "average_anytime_accuracy": average_anytime_accuracy,
}


def summarise(
    accuracy: dict[str, Matrix],
    zero_shot: dict[str, Matrix],
    scenario: str,
    learned: int,
    sizes: Matrix,
    lowest: Mapping[str, Matrix] = MappingProxyType({}),
) -> dict[str, float | None]:
    """Every metric by name: without suffix for the run's own `scenario`, and with `/task`, `/class`, ... for each one.

    accuracy: scenario -> A [T, T]. zero_shot: scenario -> [T], if there is one.
    learned: treat the stream as ending after this many tasks. sizes: [learned], the number of examples of each.
    lowest: scenario -> [T], where tasks were also evaluated while later ones were being learned.
    Undefined metrics are None.
    """
    by_scenario: dict[str, dict[str, float | None]] = {}
    for name, matrix in accuracy.items():
        before = zero_shot.get(name, np.full(len(matrix), math.nan))
        by_scenario[name] = _all_metrics(matrix[:learned, :learned], before[:learned], sizes)
        if name in lowest:
            by_scenario[name] |= _within_tasks(matrix[:learned, :learned], lowest[name][:learned])
    suffixed = {f"{metric}/{name}": value for name, row in by_scenario.items() for metric, value in row.items()}
    return by_scenario[scenario] | suffixed


def _all_metrics(accuracy: Matrix, zero_shot: Matrix, sizes: Matrix) -> dict[str, float | None]:
    values = {name: metric(accuracy) for name, metric in METRICS.items()}
    values["overall_accuracy"] = overall_accuracy(accuracy, sizes)
    values["average_incremental_accuracy"] = average_incremental_accuracy(accuracy, sizes)
    values["forward_transfer"] = forward_transfer(accuracy, zero_shot)
    return _defined(values)


def _within_tasks(accuracy: Matrix, lowest: Matrix) -> dict[str, float | None]:
    return _defined(
        {"min_accuracy": min_accuracy(lowest), "worst_case_accuracy": worst_case_accuracy(accuracy, lowest)}
    )


def _defined(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def to_rows(accuracy: Matrix) -> list[list[float | None]]:
    """The matrix as JSON rows, with None where nothing was measured."""
    return [[value if math.isfinite(value) else None for value in row] for row in accuracy.tolist()]


def from_rows(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """The float64 matrix [T, T] of JSON rows, with NaN for null and for missing entries."""
    size = max(len(rows), *map(len, rows))
    matrix = np.full((size, size), math.nan)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix
