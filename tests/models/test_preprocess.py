import numpy as np
import pytest
import torch
from PIL import Image

from cl_runner.models.preprocess import Preprocess, random_brightness, random_crop, random_flip
from tests.models.samples import images


def test_mean_and_std_are_those_of_images_in_zero_to_one():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    raw = images()
    column = (1, 3, 1, 1)
    expected = (raw.double() / 255 - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    torch.testing.assert_close(Preprocess(3, mean=mean, std=std)(raw).double(), expected, atol=1e-5, rtol=0)


def test_without_mean_and_std_images_are_scaled_to_zero_to_one():
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(Preprocess(1)(extremes).flatten(), torch.tensor([0.0, 1.0]))


def test_gray_images_are_repeated_to_the_channels():
    seen = Preprocess(3)(images((1, 8, 8)))
    assert seen.shape == (4, 3, 8, 8)
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(seen[:, 0], seen[:, 2])


def test_gray_images_are_normalised_as_each_channel_wants():
    gray = images((1, 8, 8))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    repeated = gray.expand(-1, 3, -1, -1)
    assert torch.equal(Preprocess(3, mean=mean, std=std)(gray), Preprocess(3, mean=mean, std=std)(repeated))


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (64, 48)])
def test_images_are_resized(size):
    assert Preprocess(3, size)(images()).shape == (4, 3, *size)


def test_making_an_image_smaller_averages_rather_than_picks():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = Preprocess(1, (8, 8))(stripes)[..., 2:-2, 2:-2]
    torch.testing.assert_close(small, torch.full_like(small, 100 / 255), atol=0.02, rtol=0)


def test_images_of_the_right_size_keep_their_pixels():
    raw = images()
    torch.testing.assert_close(Preprocess(3, (32, 32))(raw), raw / 255)


def test_augmentation_happens_in_train_mode_only():
    preprocess, raw = Preprocess(3, augment=("crop", "flip")), images()
    assert not torch.equal(preprocess.train()(raw), preprocess.eval()(raw))
    assert torch.equal(preprocess(raw), Preprocess(3)(raw))


def test_channels_last_changes_the_layout_and_not_the_values():
    raw = images()
    seen = Preprocess(3, channels_last=True)(raw)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen, Preprocess(3)(raw))


def test_a_random_crop_equals_a_loop_over_images():
    raw, padding = images((3, 8, 6), count=50), 3
    torch.manual_seed(1)
    cropped = random_crop(raw, padding)
    torch.manual_seed(1)
    top, left = torch.randint(2 * padding + 1, (2, len(raw), 1)).squeeze(-1)
    for image, window, row, column in zip(raw, cropped, top, left, strict=True):
        canvas = torch.zeros(3, 8 + 2 * padding, 6 + 2 * padding, dtype=torch.uint8)
        canvas[:, padding : padding + 8, padding : padding + 6] = image
        assert torch.equal(window, canvas[:, row : row + 8, column : column + 6])


def test_a_crop_reaches_every_offset():
    dot = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    dot[:, :, 2, 2] = 255
    torch.manual_seed(0)
    places = random_crop(dot, 2).flatten(1).argmax(1)
    assert len(places.unique()) == 25


def test_half_of_the_images_are_flipped_and_each_as_a_whole():
    raw = images((2, 3, 3), count=1).expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    flipped = random_flip(raw)
    mirrored = (flipped == raw.flip(-1)).flatten(1).all(1)
    assert torch.all(mirrored | (flipped == raw).flatten(1).all(1))
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5


def test_each_image_gets_brighter_or_darker_by_up_to_a_quarter_and_no_brighter_than_white():
    raw = torch.full((4000, 3, 2, 2), 220.0)
    torch.manual_seed(0)
    seen = random_brightness(raw)
    factors = seen[:, 0, 0, 0] / 220
    assert torch.equal(seen, seen[:, :1, :1, :1].expand_as(seen))
    assert 1 - 63 / 255 <= factors.min() < 0.76
    assert seen.max() <= 255
    assert (seen == 255).any()
    assert not torch.equal(Preprocess(3, augment=["brightness"])(images(count=4)), Preprocess(3)(images(count=4)))
    still = Preprocess(3, augment=["brightness"]).eval()
    assert torch.equal(still(images(count=4)), Preprocess(3)(images(count=4)))


def test_bicubic_is_pillows_to_within_its_rounding():
    raw = images((3, 9, 9), count=2) // 2 + 64  # nothing overshoots: Pillow cuts off between rows and columns
    seen = Preprocess(3, (24, 24), interpolation="bicubic")(raw) * 255
    for image, found in zip(raw, seen, strict=True):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        torch.testing.assert_close(found, expected, atol=1.0, rtol=0)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (images() / 255, TypeError, "expected images as uint8, 0 to 255, got float32"),
        (images((2, 8, 8)), ValueError, r"expected images \[B, 3, H, W\] or gray ones, got \[4, 2, 8, 8\]"),
    ],
)
def test_images_of_another_type_or_other_channels_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        Preprocess(3)(given)
