"""Metrics against matrices worked by hand."""

import math

import numpy as np
import pytest

from cl_runner import metrics

NAN = math.nan

# Rows: after task 0, 1, 2. Columns: accuracy on task 0, 1, 2.
#   0.9  0.3  0.2
#   0.6  0.8  0.4
#   0.5  0.7  0.6
MATRIX = np.array([[0.9, 0.3, 0.2], [0.6, 0.8, 0.4], [0.5, 0.7, 0.6]])
ZERO_SHOT = np.array([0.1, 0.2, 0.25])
# Joint training learns all tasks at once: its matrix has a last row and nothing else.
JOINT = np.array([[NAN, NAN, NAN], [NAN, NAN, NAN], [0.8, 0.7, 0.9]])
ONE_TASK = np.array([[0.7]])
ALIKE = np.full(3, 10.0)  # examples of each task


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows)


def test_average_accuracy_is_the_mean_of_the_last_row() -> None:
    # (0.5 + 0.7 + 0.6) / 3 = 1.8 / 3
    assert metrics.average_accuracy(MATRIX) == pytest.approx(0.6)


def test_average_forgetting_is_the_fall_from_the_earlier_best() -> None:
    # Task 0: max(0.9, 0.6) - 0.5 = 0.4; task 1: max(0.8) - 0.7 = 0.1; (0.4 + 0.1) / 2
    assert metrics.average_forgetting(MATRIX) == pytest.approx(0.25)


def test_average_forgetting_is_negative_where_tasks_end_better_than_they_had_ever_been() -> None:
    # Task 0: max(0.5, 0.6) - 0.8 = -0.2; task 1: 0.4 - 0.5 = -0.1; (-0.2 - 0.1) / 2
    gained = matrix([0.5, 0.0, 0.0], [0.6, 0.4, 0.0], [0.8, 0.5, 0.9])
    assert metrics.average_forgetting(gained) == pytest.approx(-0.15)


def test_forgetting_does_not_look_at_accuracy_from_before_a_task_was_learned() -> None:
    # Task 1 stood at 0.95 before it was learned, at 0.8 after, and ends at 0.7: 0.8 - 0.7 = 0.1.
    # Task 0: max(0.9, 0.6) - 0.5 = 0.4; (0.4 + 0.1) / 2
    lucky = MATRIX.copy()
    lucky[0, 1] = 0.95
    assert metrics.average_forgetting(lucky) == pytest.approx(0.25)


def test_backward_transfer_compares_the_end_with_when_each_task_was_learned() -> None:
    # ((0.5 - 0.9) + (0.7 - 0.8)) / 2 = -0.5 / 2
    assert metrics.backward_transfer(MATRIX) == pytest.approx(-0.25)


def test_backward_transfer_is_not_forgetting_with_its_sign_turned() -> None:
    # Task 0 peaks after task 1: forgetting 0.9 - 0.5 = 0.4, but backward transfer 0.5 - 0.6 = -0.1.
    late_peak = matrix([0.6, 0.0, 0.0], [0.9, 0.8, 0.0], [0.5, 0.8, 0.6])
    assert metrics.average_forgetting(late_peak) == pytest.approx(0.2)  # (0.4 + 0.0) / 2
    assert metrics.backward_transfer(late_peak) == pytest.approx(-0.05)  # (-0.1 + 0.0) / 2


def test_forward_transfer_compares_the_row_before_a_task_with_the_untrained_model() -> None:
    # ((0.3 - 0.2) + (0.4 - 0.25)) / 2 = 0.25 / 2
    assert metrics.forward_transfer(MATRIX, ZERO_SHOT) == pytest.approx(0.125)


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    # (0.9 + 0.8 + 0.6) / 3 = 2.3 / 3
    assert metrics.learning_accuracy(MATRIX) == pytest.approx(2.3 / 3)


def test_average_anytime_accuracy_is_the_mean_over_the_stream_of_the_mean_over_tasks_seen() -> None:
    # (0.9 + (0.6 + 0.8) / 2 + (0.5 + 0.7 + 0.6) / 3) / 3 = (0.9 + 0.7 + 0.6) / 3
    assert metrics.average_anytime_accuracy(MATRIX) == pytest.approx(2.2 / 3)


def test_the_overall_accuracy_counts_examples_where_the_average_counts_tasks() -> None:
    sizes = np.array([50.0, 10.0, 40.0])
    # (50 * 0.5 + 10 * 0.7 + 40 * 0.6) / 100 = 0.56
    assert metrics.overall_accuracy(MATRIX, sizes) == pytest.approx(0.56)
    assert metrics.overall_accuracy(MATRIX, np.ones_like(sizes)) == metrics.average_accuracy(MATRIX)


def test_the_average_incremental_accuracy_is_the_mean_over_the_stream_of_the_overall_one() -> None:
    sizes = np.array([50.0, 10.0, 40.0])
    # (0.9 + (50 * 0.6 + 10 * 0.8) / 60 + 0.56) / 3
    expected = (0.9 + 38 / 60 + 0.56) / 3
    assert metrics.average_incremental_accuracy(MATRIX, sizes) == pytest.approx(expected)
    summary = metrics.summarise({"class": MATRIX}, {}, "class", 3, sizes)
    assert summary["average_incremental_accuracy"] == pytest.approx(expected)
    assert summary["overall_accuracy/class"] == pytest.approx(0.56)


def test_the_minimum_is_of_all_but_the_last_task_whose_accuracy_completes_the_worst_case() -> None:
    lowest = np.array([0.4, 0.1, NAN])
    # (0.4 + 0.1) / 2; (0.4 + 0.1 + 0.6) / 3 = 0.6 / 3 + (1 - 1 / 3) * 0.25
    assert metrics.min_accuracy(lowest) == pytest.approx(0.25)
    assert metrics.worst_case_accuracy(MATRIX, lowest) == pytest.approx(1.1 / 3)
    assert math.isnan(metrics.min_accuracy(np.array([NAN])))
    assert metrics.worst_case_accuracy(ONE_TASK, np.array([NAN])) == pytest.approx(0.7)


def test_the_forgetting_matrix_holds_the_fall_of_each_task_after_each_later_one() -> None:
    # [1, 0] = 0.9 - 0.6; [2, 0] = max(0.9, 0.6) - 0.5; [2, 1] = 0.8 - 0.7
    expected = matrix([NAN, NAN, NAN], [0.3, NAN, NAN], [0.4, 0.1, NAN])
    np.testing.assert_allclose(metrics.forgetting_matrix(MATRIX), expected)


def test_an_unmeasured_entry_is_no_candidate_for_the_best() -> None:
    # Task 0 was not measured after task 1: its best is 0.9, so 0.9 - 0.5; after task 1 nothing can be said.
    gap = MATRIX.copy()
    gap[1, 0] = NAN
    expected = matrix([NAN, NAN, NAN], [NAN, NAN, NAN], [0.4, 0.1, NAN])
    np.testing.assert_allclose(metrics.forgetting_matrix(gap), expected)


@pytest.mark.parametrize("name", ["average_forgetting", "backward_transfer"])
def test_forgetting_and_transfer_are_undefined_for_one_task(name: str) -> None:
    assert math.isnan(metrics.METRICS[name](ONE_TASK))


def test_forward_transfer_is_undefined_for_one_task() -> None:
    assert math.isnan(metrics.forward_transfer(ONE_TASK, np.array([0.1])))


@pytest.mark.parametrize("name", ["average_accuracy", "learning_accuracy", "average_anytime_accuracy"])
def test_one_task_is_as_accurate_as_it_was_learned(name: str) -> None:
    assert metrics.METRICS[name](ONE_TASK) == pytest.approx(0.7)


def test_joint_training_has_a_final_accuracy_and_nothing_else() -> None:
    summary = metrics.summarise({"class": JOINT}, {"class": ZERO_SHOT}, "class", 3, ALIKE)
    defined = {name: value for name, value in summary.items() if value is not None}
    names = ["average_accuracy", "overall_accuracy"]
    assert defined == {name + suffix: pytest.approx(0.8) for name in names for suffix in ("", "/class")}


def test_the_summary_has_the_own_scenario_plain_and_every_scenario_suffixed() -> None:
    summary = metrics.summarise({"task": MATRIX + 0.1, "class": MATRIX}, {}, "class", 3, ALIKE)
    assert summary["average_accuracy"] == summary["average_accuracy/class"] == pytest.approx(0.6)
    assert summary["average_accuracy/task"] == pytest.approx(0.7)
    names = [*metrics.METRICS, "forward_transfer", "overall_accuracy", "average_incremental_accuracy"]
    assert set(summary) == {name + suffix for name in names for suffix in ("", "/task", "/class")}


def test_what_happened_within_tasks_is_summed_up_where_it_was_measured() -> None:
    of = {"class": MATRIX, "task": JOINT}
    found = metrics.summarise(of, {}, "class", 3, ALIKE, {"class": np.array([0.4, 0.1, NAN]), "task": np.full(3, NAN)})
    assert (found["min_accuracy"], found["min_accuracy/class"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (found["min_accuracy/task"], found["worst_case_accuracy/task"]) == (None, None)
    assert "min_accuracy" not in metrics.summarise(of, {}, "class", 3, ALIKE)


def test_forward_transfer_is_none_where_there_is_no_zero_shot() -> None:
    summary = metrics.summarise({"task": MATRIX, "class": MATRIX}, {"class": ZERO_SHOT}, "class", 3, ALIKE)
    assert summary["forward_transfer/task"] is None
    assert summary["forward_transfer/class"] == pytest.approx(0.125)


def test_a_summary_after_two_tasks_knows_nothing_of_the_third() -> None:
    # The upper left 2x2: average (0.6 + 0.8) / 2, forgetting 0.9 - 0.6, forward transfer 0.3 - 0.2.
    expected = metrics.summarise({"class": MATRIX[:2, :2]}, {"class": ZERO_SHOT[:2]}, "class", 2, ALIKE[:2])
    assert expected["average_accuracy"] == pytest.approx(0.7)
    assert expected["average_forgetting"] == pytest.approx(0.3)
    assert expected["forward_transfer"] == pytest.approx(0.1)
    assert metrics.summarise({"class": MATRIX}, {"class": ZERO_SHOT}, "class", 2, ALIKE[:2]) == expected


def test_a_matrix_survives_its_way_through_json_rows() -> None:
    rows = metrics.to_rows(JOINT)
    assert rows == [[None] * 3, [None] * 3, [0.8, 0.7, 0.9]]
    np.testing.assert_allclose(metrics.from_rows(rows), JOINT)
