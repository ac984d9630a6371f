from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cl_runner.errors import ConfigError
from cl_runner.streams.datasets import Digits
from cl_runner.streams.rotated import Rotated
from tests.streams.data import read_image, write_folder, write_mnist

CPU = torch.device("cpu")


@pytest.mark.parametrize("pad_to", [None, 32])
def test_every_pixel_is_where_pil_turns_it(tmp_path: Path, pad_to: int | None) -> None:
    images, _ = write_mnist(tmp_path)["train"]
    recipe = Rotated(name="mnist", num_tasks=6, angles=[0, 12.3, 45, 90, 131.7, 180], pad_to=pad_to)
    margin = 0 if pad_to is None else 2
    padded = np.pad(images, [(0, 0), (margin, margin), (margin, margin)])
    for angle, task in zip(recipe.angles or [], recipe.load(str(tmp_path), CPU).tasks, strict=True):
        expected = np.stack([np.array(Image.fromarray(image).rotate(angle)) for image in padded])
        assert np.array_equal(task.train.images[:, 0].numpy(), expected)


def test_oblong_colour_images_turn_as_pil_turns_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a"], size=(9, 6))
    turned = Rotated(name="birds", num_tasks=1, angles=[-30.0]).load(str(tmp_path), CPU).tasks[0].test.images
    image = Image.fromarray(read_image(tmp_path / "birds" / "test" / "a" / "001.png"))
    assert np.array_equal(turned[1].permute(1, 2, 0).numpy(), np.array(image.rotate(-30.0)))


def test_angles_are_drawn_by_the_seed() -> None:
    def angles(seed: int) -> list[float]:
        recipe = Rotated(name="digits", num_tasks=200, max_angle=90.0, seed=seed)
        return [recipe.angle(index) for index in range(200)]

    drawn = angles(1)
    assert drawn == angles(1) != angles(2)
    assert 0 <= min(drawn) < 5
    assert 85 < max(drawn) <= 90


def test_a_turned_image_keeps_its_label() -> None:
    for task in Rotated(name="digits", num_tasks=2).load("unused", CPU).tasks:
        assert torch.equal(task.train.labels, Digits().read().train_labels)


def test_angles_must_be_as_many_as_tasks() -> None:
    with pytest.raises(ConfigError, match="expected 3 angles, one per task, got 2") as error:
        Rotated(name="digits", num_tasks=3, angles=[0.0, 90.0])
    assert error.value.field == "stream.angles"
