import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cl_runner.errors import ConfigError
from cl_runner.streams.base import Examples
from cl_runner.streams.datasets import KNOWN, Digits
from cl_runner.streams.permuted import Permuted
from cl_runner.streams.recipe import statistics
from cl_runner.streams.split import Split
from tests.streams.data import write_folder, write_mnist

CPU = torch.device("cpu")
CONF = Path(__file__).parents[2] / "conf" / "stream"


def counts(examples: Examples) -> list[int]:
    return torch.bincount(examples.labels, minlength=10).tolist()


def one_task(**arguments):
    """All digits as one task."""
    return Split(**{"name": "digits", "num_tasks": 1, **arguments}).load("unused", CPU).tasks[0]


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_is_a_share_of_each_class_and_of_the_training_images_only() -> None:
    whole, task = one_task(), one_task(validation=0.25)
    for total, train, held in zip(counts(whole.train), counts(task.train), counts(task.validation), strict=True):
        assert held == round(0.25 * total)
        assert train == total - held
    assert rows(task.train.images).isdisjoint(rows(task.validation.images))
    assert rows(task.train.images) | rows(task.validation.images) == rows(whole.train.images)
    assert torch.equal(task.test.images, whole.test.images)


def test_there_is_no_validation_unless_asked_for() -> None:
    task = one_task()
    assert len(task.validation) == 0
    assert torch.equal(task.train.images, Digits().read().train_images)


def test_the_limit_a_class_is_of_the_training_images_only() -> None:
    task = one_task(max_per_class=20, validation=0.25)
    assert counts(task.train) == [15] * 10
    assert counts(task.validation) == [5] * 10
    assert len(task.test) == len(one_task().test)


def test_some_images_are_left_to_learn_from() -> None:
    task = one_task(max_per_class=2, validation=0.9)
    assert (counts(task.train), counts(task.validation)) == ([1] * 10, [1] * 10)


@pytest.mark.parametrize(("most", "share"), [(1, 0.9), (4, 0.1)])
def test_a_share_that_sets_nothing_aside_is_refused(most: int, share: float) -> None:
    with pytest.raises(ConfigError, match=f"stream.validation: .* one of the {most} training images .*, got {share}"):
        one_task(max_per_class=most, validation=share)


def test_a_recipe_whose_task_has_no_classes_is_refused() -> None:
    class Gap(Split):
        def labels(self, index: int, num_classes: int) -> torch.Tensor:
            labels = super().labels(index, num_classes)
            return torch.full_like(labels, -1) if index == 2 else labels

    with pytest.raises(ConfigError, match="at least one class in each task, got none in task 2"):
        Gap(name="digits", num_tasks=5).prepare("unused")


def test_a_recipe_of_ones_own_may_prepare_its_labels_after_the_base_class_has_been_set_up() -> None:
    class Turned(Split):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.turn = 1

        def labels(self, index: int, num_classes: int) -> torch.Tensor:
            return super().labels(index, num_classes).roll(self.turn)

    assert Turned(name="digits", num_tasks=5).task_sizes == [2] * 5


def test_the_seed_chooses_the_images() -> None:
    chosen, again, other = (one_task(max_per_class=20, seed=seed).train.images for seed in (1, 1, 2))
    assert torch.equal(chosen, again)
    assert not torch.equal(chosen, other)


def test_images_are_padded_with_black_around_them() -> None:
    padded = one_task(pad_to=13).train.images
    assert padded.shape[1:] == (1, 13, 13)
    assert torch.equal(padded[:, :, 2:10, 2:10], one_task().train.images)
    assert padded.long().sum() == one_task().train.images.long().sum()


def test_the_stream_tells_the_shape_of_its_images() -> None:
    stream = Permuted(name="digits", num_tasks=2, pad_to=12, augment=["crop"], crop_padding=2).load("unused", CPU)
    assert stream.image_shape == tuple(stream.tasks[1].test.images.shape[1:]) == (1, 12, 12)
    assert (stream.augment, stream.crop_padding) == (("crop",), 2)


def test_images_stay_in_zero_to_one_unless_normalised() -> None:
    stream = Split(name="digits", num_tasks=5, mean=[0.5], std=[0.5]).load("unused", CPU)
    assert stream.mean is stream.std is None


def test_a_given_mean_comes_before_the_published_one(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    published = Split(name="mnist", num_tasks=5, normalize=True).load(str(tmp_path), CPU)
    given = Split(name="mnist", num_tasks=5, normalize=True, mean=[0.4], std=[0.2]).load(str(tmp_path), CPU)
    assert (published.mean, published.std) == (KNOWN["mnist"].mean, KNOWN["mnist"].std)
    assert (given.mean, given.std) == ((0.4,), (0.2,))


def test_what_is_not_published_is_computed_from_the_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b"], train=30)
    stream = Split(name="birds", num_tasks=2, normalize=True, max_per_class=3).load(str(tmp_path), CPU)
    whole = Split(name="birds", num_tasks=1).load(str(tmp_path), CPU).tasks[0].train.images.numpy() / 255
    np.testing.assert_allclose(stream.mean or (), whole.mean((0, 2, 3)))
    np.testing.assert_allclose(stream.std or (), whole.std((0, 2, 3)))


def test_a_channel_that_never_changes_can_be_normalised() -> None:
    mean, std = statistics(torch.full((4, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == pytest.approx((0.2,))
    assert std[0] > 0


def test_a_data_set_too_large_for_the_device_stays_in_host_memory() -> None:
    stream = Split(name="digits", num_tasks=5, max_device_gb=1e-5).load("unused", torch.device("meta"))
    assert stream.tasks[0].train.images.device == CPU


def test_the_classes_of_a_folder_are_known_once_it_is_prepared(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b", "c", "d"])
    recipe = Split(name="birds", num_tasks=2)
    recipe.prepare(str(tmp_path))
    assert recipe.num_classes == 4


def test_a_folder_that_cannot_be_split_is_refused_when_prepared(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="expected one of 1, 2, 4 for 4 classes; got 3"):
        Split(name="birds", num_tasks=3).prepare(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"pad_to": 27}, "stream.pad_to"),
        ({"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.3]}, "stream.mean"),
        ({"mean": [0.1]}, "stream.std"),
        ({"image_size": 32}, "stream.image_size"),
        ({"name": "../mnist"}, "stream.name"),
        ({"name": ""}, "stream.name"),
    ],
)
def test_what_cannot_work_is_refused_before_data_is_read(arguments: dict, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        Split(**{"name": "mnist", "num_tasks": 5, **arguments})
    assert error.value.field == field


def test_padding_that_a_folders_images_exceed_is_refused_when_prepared(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b"], size=(6, 9))
    with pytest.raises(ConfigError, match="expected at least the images' 9 pixels, got 8"):
        Split(name="birds", num_tasks=2, pad_to=8).prepare(str(tmp_path))


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_streams_yaml_holds_every_argument_with_its_default(path: Path) -> None:
    node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(node, dict)
    module, _, name = node.pop("_target_").rpartition(".")
    recipe = getattr(import_module(module), name)
    assert set(node) == set(inspect.signature(recipe).parameters)
    own = {
        key: node.pop(key) for key in ("name", "num_tasks", "normalize", "seed")
    }  # what makes the choice, and ${seed}
    assert node == {key: vars(recipe(name="digits", num_tasks=own["num_tasks"]))[key] for key in node}
