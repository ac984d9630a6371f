from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_runner.errors import ConfigError
from cl_runner.streams.folder import ImageFolder
from tests.streams.data import read_image, write_folder


def test_images_and_labels_are_those_of_the_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["wren", "crow", "tit"], size=(7, 5))
    folder = ImageFolder(tmp_path / "birds")
    data = folder.read()
    assert folder.classes == ["crow", "tit", "wren"]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    for row, path in enumerate(sorted((tmp_path / "birds" / "test").glob("*/*.png"))):
        assert np.array_equal(data.test_images[row].permute(1, 2, 0).numpy(), read_image(path))


def test_classes_that_are_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path / "letters", [str(number) for number in range(11)])
    assert ImageFolder(tmp_path / "letters").classes == [str(number) for number in range(11)]


def test_images_are_gray_when_all_of_them_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "marks", ["a", "b"], mode="L")
    data = ImageFolder(tmp_path / "marks").read()
    assert data.image_shape == (1, 6, 6)
    assert np.array_equal(data.test_images[0, 0].numpy(), read_image(tmp_path / "marks" / "test" / "a" / "000.png"))


@pytest.mark.parametrize("coloured", ["train/a", "test/b"])
def test_one_image_in_colour_makes_all_of_them_so(tmp_path: Path, coloured: str) -> None:
    write_folder(tmp_path / "marks", ["a", "b"], mode="L")
    Image.new("RGB", (6, 6), (200, 100, 50)).save(tmp_path / "marks" / coloured / "000.png")
    data = ImageFolder(tmp_path / "marks").read()
    images = data.train_images if coloured == "train/a" else data.test_images
    row = 0 if coloured == "train/a" else 2
    assert images[row, :, 0, 0].tolist() == [200, 100, 50]
    assert images[row + 1, 0].equal(images[row + 1, 2])


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "JPG"])
def test_other_files_are_left_aside(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path / "birds", ["a", "b"], suffix=suffix)
    (tmp_path / "birds" / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "birds" / "train" / ".hidden").mkdir()
    assert len(ImageFolder(tmp_path / "birds").read().train_images) == 8


def test_images_that_differ_in_size_ask_for_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b"])
    odd = tmp_path / "birds" / "test" / "b" / "001.png"
    Image.new("RGB", (9, 4)).save(odd)
    with pytest.raises(ConfigError, match=f"6x6 in .* and 9x4 in {odd}") as error:
        ImageFolder(tmp_path / "birds").read()
    assert error.value.field == "stream.image_size"
    assert ImageFolder(tmp_path / "birds", image_size=5).read().image_shape == (3, 5, 5)


def test_the_middle_of_an_oblong_image_is_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a"])
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 255
    Image.fromarray(stripes).save(tmp_path / "birds" / "train" / "a" / "000.png")
    assert ImageFolder(tmp_path / "birds", image_size=8).read().train_images[0].min() == 255


def without_test(folder: Path) -> Path:
    (folder / "test").rename(folder.parent / "elsewhere")
    return folder / "test"


def without_a_test_class(folder: Path) -> Path:
    (folder / "test" / "b").rename(folder.parent / "elsewhere")
    return folder


def without_images(folder: Path) -> Path:
    for file in (folder / "train" / "b").iterdir():
        file.unlink()
    return folder / "train" / "b"


def with_a_broken_image(folder: Path) -> Path:
    broken = folder / "train" / "b" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return broken


def with_16_bits(folder: Path) -> Path:
    deep = folder / "test" / "a" / "000.png"
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(deep)
    return deep


@pytest.mark.parametrize(
    "damage", [without_test, without_a_test_class, without_images, with_a_broken_image, with_16_bits]
)
def test_a_folder_that_will_not_do_is_named_in_one_line(tmp_path: Path, damage) -> None:
    write_folder(tmp_path / "birds", ["a", "b"])
    path = damage(tmp_path / "birds")
    with pytest.raises(ConfigError) as error:
        ImageFolder(tmp_path / "birds").read()
    assert error.value.field == "data_root"
    assert str(path) in error.value.message
    assert "\n" not in error.value.message
    assert not (tmp_path / ".cl_runner").exists()
