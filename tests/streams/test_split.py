import numpy as np
import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.streams.base import Scenario, Stream
from cl_runner.streams.datasets import Digits
from cl_runner.streams.split import Split

CPU = torch.device("cpu")


def split_digits(**arguments) -> Stream:
    return Split(**{"name": "digits", "num_tasks": 5, **arguments}).load("unused", CPU)


@pytest.mark.parametrize("scenario", [Scenario.TASK, Scenario.CLASS])
def test_tasks_share_no_class(scenario: Scenario) -> None:
    stream = split_digits(scenario=scenario)
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in stream.tasks:
        assert set(task.train.labels.tolist()) == set(task.test.labels.tolist()) == set(task.classes)


@pytest.mark.parametrize(("scenario", "said"), [("task", True), ("domain", True), ("class", False)])
def test_tasks_of_one_class_are_warned_of_where_that_makes_them_trivial(scenario, said, caplog) -> None:
    split_digits(scenario=scenario, num_tasks=10)
    assert ("whose " + scenario + " accuracy is always 100 %" in caplog.text) == said


def test_every_image_is_in_one_task() -> None:
    digits, stream = Digits().read(), split_digits()
    assert sum(len(task.train) for task in stream.tasks) == len(digits.train_labels)
    assert sum(len(task.test) for task in stream.tasks) == len(digits.test_labels)


@pytest.mark.parametrize("order", [7, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]])
def test_a_label_is_a_place_in_the_class_order(order: int | list[int]) -> None:
    digits, stream = Digits().read(), split_digits(class_order=order)
    expected = np.random.RandomState(order).permutation(10) if isinstance(order, int) else order
    for task in stream.tasks:
        for label in task.classes:
            of_class = digits.train_images[digits.train_labels == int(expected[label])]
            assert torch.equal(task.train.images[task.train.labels == label], of_class)


def test_tasks_share_their_labels_in_the_domain_scenario() -> None:
    digits, stream = Digits().read(), split_digits(scenario="domain")
    assert stream.num_classes == 2
    assert all(task.classes == (0, 1) for task in stream.tasks)
    fourth = stream.tasks[3].train
    assert torch.equal(fourth.images[fourth.labels == 1], digits.train_images[digits.train_labels == 7])


def test_examples_carry_their_tasks_index() -> None:
    for index, task in enumerate(split_digits().tasks):
        assert task.index == index
        assert set(task.train.task_ids.tolist()) == {index}


def test_the_first_task_may_be_larger() -> None:
    stream = split_digits(num_tasks=3, first_task_classes=6)
    assert [len(task.classes) for task in stream.tasks] == [6, 2, 2]
    assert stream.num_classes == 10


@pytest.mark.parametrize(
    ("arguments", "field", "choices"),
    [
        ({"num_tasks": 3}, "stream.num_tasks", "1, 2, 5, 10"),
        ({"num_tasks": 5, "first_task_classes": 4}, "stream.num_tasks", "2, 3, 4, 7"),
        ({"num_tasks": 1, "first_task_classes": 5}, "stream.num_tasks", "2, 6"),
        ({"num_tasks": 2, "first_task_classes": 10}, "stream.first_task_classes", "less than the 10"),
        ({"num_tasks": 3, "first_task_classes": 6, "scenario": "domain"}, "stream.first_task_classes", "null"),
        ({"class_order": [0, 1, 2]}, "stream.class_order", "each of 0 to 9 once"),
        ({"class_order": [0, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, "stream.class_order", "each of 0 to 9 once"),
    ],
)
def test_what_cannot_be_split_is_refused_before_data_is_read(arguments: dict, field: str, choices: str) -> None:
    with pytest.raises(ConfigError, match=choices) as error:
        Split(**{"name": "mnist", "num_tasks": 5, **arguments})
    assert error.value.field == field


def test_a_stream_that_ends_early_keeps_its_labels() -> None:
    whole, short = split_digits(class_order=3), split_digits(class_order=3, max_tasks=2)
    assert len(short) == 2
    assert short.num_classes == whole.num_classes == 10
    assert torch.equal(short.tasks[1].train.images, whole.tasks[1].train.images)


def test_it_cannot_end_later_than_it_does() -> None:
    with pytest.raises(ConfigError, match=r"stream\.max_tasks: expected at most num_tasks=5, got 6"):
        Split(name="digits", num_tasks=5, max_tasks=6)
