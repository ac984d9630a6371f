import io
import math

import numpy as np
import pytest
from PIL import Image

from cl_runner.metrics import from_rows, to_rows
from cl_runner.trackers import drawing, figures
from cl_runner.trackers.colours import INK

METRICS = {"average_accuracy": 0.63, "average_forgetting": 0.225}


def lower(tasks: int, value: float) -> np.ndarray:
    """Accuracy `value` on every task seen so far."""
    return np.where(np.tril(np.ones((tasks, tasks), dtype=bool)), value, math.nan)


def pixels(matrix: np.ndarray) -> np.ndarray:
    return figures.to_pixels(figures.matrix_figure(matrix, "title"))


def texts(matrix: np.ndarray) -> list[str]:
    return [text.get_text() for text in figures.matrix_figure(matrix, "").axes[0].texts]


@pytest.mark.parametrize("tasks", [1, 3, 25])
def test_every_picture_has_the_same_size(tasks: int) -> None:
    assert pixels(lower(tasks, 0.5)).shape == (800, 1600, 3)


def test_the_png_is_the_picture() -> None:
    figure = figures.matrix_figure(lower(3, 0.5), "title")
    with Image.open(io.BytesIO(drawing.drawn(figure))) as picture:
        difference = np.asarray(picture.convert("RGB")).astype(int) - figures.to_pixels(figure)
    assert np.abs(difference).max() == 0


def test_a_colour_means_the_same_in_every_picture() -> None:
    # A corner of the lower left cell, clear of its number; beside other values, in a stream of another length.
    high, mixed = lower(4, 0.3), lower(8, 0.9)
    mixed[7, 0] = 0.3
    assert (pixels(high)[700, 90] == pixels(mixed)[700, 90]).all()
    assert (pixels(high)[700, 90] != pixels(lower(4, 0.9))[700, 90]).any()


def test_what_was_not_measured_stays_blank() -> None:
    picture = pixels(lower(4, 0.5))
    assert (picture[150, 600] == 255).all()
    assert (picture[700, 90] != 255).any()


def test_cells_carry_their_numbers_in_percent() -> None:
    matrix = lower(2, 0.5)
    matrix[1, 0] = 0.123
    assert texts(matrix) == ["50.0", "12.3", "50.0"]


def test_numbers_are_dropped_where_they_do_not_fit() -> None:
    assert len(texts(lower(20, 0.5))) == 210
    assert texts(lower(21, 0.5)) == []


@pytest.mark.parametrize("word", ["a=1", "pretrained_strength=100", 120 * "x"])
def test_a_wrapped_title_has_no_more_lines_than_asked_for(word: str) -> None:
    for count in (1, 2, 3, 8, 30):
        lines = drawing.wrapped("ewc " + " ".join([word] * count), 46).splitlines()
        assert len(lines) <= 2
        assert max(map(len, lines)) <= 46


def test_numbers_are_light_on_dark_and_dark_on_light() -> None:
    assert drawing.readable_on(drawing.ACCURACY.colours(1.0)) == "white"
    assert drawing.readable_on(drawing.ACCURACY.colours(0.0)) == INK


@pytest.mark.parametrize(
    ("scale", "steps"), [(drawing.ACCURACY, [0.0, 0.25, 0.5, 0.75, 1.0]), (drawing.FORGETTING, [0.5, 0.75, 1.0])]
)
def test_more_is_darker(scale: drawing.ColourScale, steps: list[float]) -> None:
    lightness = [np.dot(scale.colours(step)[:3], [0.2126, 0.7152, 0.0722]) for step in steps]
    assert lightness == sorted(lightness, reverse=True)


def test_the_title_says_the_name_and_what_is_defined() -> None:
    rows = to_rows(lower(2, 0.5))
    both = figures.accuracy_figure(rows, "ewc $_$ s0", METRICS)
    joint = figures.accuracy_figure(rows, "joint", METRICS | {"average_forgetting": None})
    assert both.texts[0].get_text() == "ewc $_$ s0 · average accuracy 63.0 % · forgetting 22.5 %"
    assert joint.texts[0].get_text() == "joint · average accuracy 63.0 %"


def test_a_long_title_keeps_its_numbers() -> None:
    figure = figures.accuracy_figure(to_rows(lower(2, 0.5)), "x" * 300, METRICS)
    title = figure.texts[0].get_text()
    assert len(title) <= 120
    assert title.endswith("average accuracy 63.0 % · forgetting 22.5 %")


def test_a_matrix_without_forgetting_says_so() -> None:
    joint = from_rows([[None, None], [0.5, 0.6]])
    assert [text.get_text() for text in figures.matrix_figure(joint, "").axes[2].texts] == ["undefined"]


@pytest.mark.parametrize("tasks", [1, 3, 25])
def test_tiles_are_squares_of_one_size(tasks: int) -> None:
    pictures = figures.tiles(to_rows(lower(tasks, 0.5)), "a name", METRICS)
    assert [figures.to_pixels(picture).shape for picture in pictures] == [(800, 800, 3)] * 2


def test_a_tile_shows_its_matrix_under_the_name_and_the_metrics() -> None:
    matrix = lower(2, 0.5)
    matrix[1, 0] = 0.2
    accuracy, forgetting = figures.tiles(to_rows(matrix), "ewc · s0", METRICS)
    assert [text.get_text() for text in accuracy.axes[0].texts] == ["50.0", "20.0", "50.0"]
    assert [text.get_text() for text in forgetting.axes[0].texts] == ["30.0"]
    said = ["ewc · s0", "average accuracy 63.0 % · forgetting 22.5 %"]
    assert [[text.get_text() for text in tile.texts] for tile in (accuracy, forgetting)] == [said, said]


@pytest.mark.parametrize("length", [10, 70, 200])
def test_a_name_fits_its_tile(length: int) -> None:
    tile, _ = figures.tiles(to_rows(lower(2, 0.5)), "ewc " * (length // 4), METRICS)
    renderer = figures.FigureCanvasAgg(tile).get_renderer()
    assert tile.texts[0].get_window_extent(renderer).x1 < figures.TILE[0]
