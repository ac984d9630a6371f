from pathlib import Path

import pytest
import torch

from cl_runner.streams.base import Stream
from cl_runner.streams.datasets import Digits
from cl_runner.streams.permuted import Permuted
from tests.streams.data import write_folder

CPU = torch.device("cpu")


def permuted_digits(**arguments) -> Stream:
    return Permuted(**{"name": "digits", "num_tasks": 3, **arguments}).load("unused", CPU)


def test_a_task_permutes_all_its_images_alike_in_every_channel(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b"], size=(5, 4), train=20)
    plain, moved = Permuted(name="birds", num_tasks=2).load(str(tmp_path), CPU).tasks
    before, after = plain.train.images.flatten(2), moved.train.images.flatten(2)
    # Of forty random values a pixel, over one channel, no two are the same: they tell where each pixel went.
    source = (after[:, 0, :, None] == before[:, 0, None, :]).all(0).int().argmax(1)
    assert torch.equal(source.sort().values, torch.arange(20))
    assert not torch.equal(source, torch.arange(20))
    assert torch.equal(after, before[:, :, source])
    assert torch.equal(moved.test.images.flatten(2), plain.test.images.flatten(2)[:, :, source])


def test_the_first_task_is_the_data_set_itself_if_asked_for() -> None:
    digits = Digits().read().train_images
    assert torch.equal(permuted_digits(first_identity=True).tasks[0].train.images, digits)
    assert not torch.equal(permuted_digits(first_identity=False).tasks[0].train.images, digits)


@pytest.mark.parametrize("change", [{"first_identity": False}, {"num_tasks": 7}, {"scenario": "class"}])
def test_a_permutation_depends_on_its_seed_and_index_alone(change: dict) -> None:
    images = permuted_digits(seed=4).tasks[2].test.images
    assert torch.equal(images, permuted_digits(seed=4, **change).tasks[2].test.images)
    assert not torch.equal(images, permuted_digits(seed=5, **change).tasks[2].test.images)


def test_no_two_tasks_are_permuted_alike() -> None:
    first, second, third = (task.test.images for task in permuted_digits().tasks)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_padding_is_permuted_too() -> None:
    edge = permuted_digits(pad_to=12).tasks[1].train.images[:, 0, 0]
    assert edge.any()


def test_labels_are_the_data_sets_own_in_the_domain_scenario() -> None:
    stream = permuted_digits()
    assert stream.num_classes == 10
    for task in stream.tasks:
        assert task.classes == tuple(range(10))
        assert torch.equal(task.test.labels, Digits().read().test_labels)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_every_task_has_labels_of_its_own_in_the_other_scenarios(scenario: str) -> None:
    stream = permuted_digits(scenario=scenario)
    assert stream.num_classes == 30
    assert stream.tasks[2].classes == tuple(range(20, 30))
    assert torch.equal(stream.tasks[2].test.labels, Digits().read().test_labels + 20)
