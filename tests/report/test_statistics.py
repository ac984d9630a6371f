"""Means, spreads and intervals, against numbers worked by hand and printed tables."""

import math

import numpy as np
import pytest

from cl_runner.report.statistics import (
    mean_of_matrices,
    over_tasks,
    paired_difference,
    summarise,
    t_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (10, 2.22814),
        (30, 2.04227),
        (2000, 1.96115),
    ],
)
def test_the_quantile_of_student_is_that_of_the_printed_tables(freedom, printed):
    assert t_quantile(freedom) == pytest.approx(printed, abs=1e-5)


def test_a_summary_is_that_of_the_sample_worked_by_hand():
    found = summarise([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.n, found.mean) == (4, 2.5)
    assert found.std == pytest.approx(math.sqrt(5 / 3))
    assert found.sem == pytest.approx(math.sqrt(5 / 3) / 2)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_one_value_has_a_mean_and_no_spread():
    found = summarise([3.0])
    assert (found.n, found.mean) == (1, 3.0)
    assert all(math.isnan(value) for value in (found.std, found.sem, found.low, found.high))


def test_what_was_not_measured_is_not_counted():
    assert summarise([1.0, None, 3.0]).n == 2
    assert summarise([1.0, None, 3.0]).mean == 2.0
    assert math.isnan(summarise([None, None]).mean)


def test_a_difference_is_of_equal_seeds_alone():
    values = {0: 0.5, 1: 0.7, 2: 0.9, 3: 0.8, 4: None}
    baseline = {0: 0.4, 1: 0.5, 2: 0.6, 4: 0.9, 5: 0.1}
    found = paired_difference(values, baseline)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert found.n == 3
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))


def test_a_constant_shift_is_seen_however_much_the_seeds_differ():
    found = paired_difference({seed: seed + 0.25 for seed in range(5)}, dict(enumerate(map(float, range(5)))))
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))


def test_a_mean_matrix_has_no_entry_that_one_seed_lacks():
    one, other = np.array([[0.2, np.nan], [0.4, 0.6]]), np.array([[0.4, 0.1], [np.nan, 0.8]])
    np.testing.assert_allclose(mean_of_matrices([one, other]), [[0.3, np.nan], [np.nan, 0.7]])


def test_over_tasks_looks_at_what_was_learned_by_then():
    matrix = np.array([[0.9, 0.1, 0.1], [0.7, 0.8, 0.1], [0.5, 0.6, 1.0]])
    np.testing.assert_allclose(over_tasks([matrix, matrix]), [[0.9, 0.75, 0.7]] * 2)


def test_forgetting_over_tasks_leaves_out_the_task_just_learned():
    matrix = np.array([[np.nan, np.nan, np.nan], [0.2, np.nan, np.nan], [0.4, 0.2, np.nan]])
    np.testing.assert_allclose(over_tasks([matrix], before=1), [[np.nan, 0.2, 0.3]])
