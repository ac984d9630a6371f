"""Draw a run's accuracy matrix, with its forgetting beside it.

Scales and sizes are fixed, so that pictures of different runs, and of streams of different lengths, can be compared.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cl_runner.metrics import forgetting_matrix, from_rows
from cl_runner.trackers.colours import FAINT, INK
from cl_runner.trackers.drawing import ACCURACY, DPI, FORGETTING, ColourScale, blank, readable_on, shortened
from cl_runner.trackers.names import percent

SIZE = (1600, 800)  # pixels, width x height
TILE = (800, 800)  # of a single matrix
MAX_NUMBERED = 20  # tasks: beyond, numbers no longer fit their cells
TITLES = {ACCURACY: "accuracy", FORGETTING: "forgetting since the best"}


def accuracy_figure(rows: Sequence[Sequence[float | None]], name: str, metrics: Mapping[str, float | None]) -> Figure:
    """The matrix of `rows` (None: not measured) and its forgetting, titled with the run's name and two metrics."""
    return matrix_figure(from_rows(rows), " · ".join([name, *_said(metrics)]))


def matrix_figure(accuracy: np.ndarray, title: str) -> Figure:
    """A figure of SIZE pixels: accuracy [T, T], and forgetting beside it."""
    figure = blank(SIZE[0] / DPI, SIZE[1] / DPI)
    _write(figure, 0.05, 0.935, shortened(title, 118))
    _panel(figure, (0.05, 0.36), accuracy, ACCURACY)
    _panel(figure, (0.545, 0.36), forgetting_matrix(accuracy), FORGETTING)
    return figure


def tiles(
    rows: Sequence[Sequence[float | None]], name: str, metrics: Mapping[str, float | None]
) -> tuple[Figure, Figure]:
    """The matrix of `rows` and its forgetting, each a figure of TILE pixels titled with the run's name."""
    accuracy = from_rows(rows)
    return _tile(accuracy, ACCURACY, name, metrics), _tile(forgetting_matrix(accuracy), FORGETTING, name, metrics)


def _tile(matrix: np.ndarray, scale: ColourScale, name: str, metrics: Mapping[str, float | None]) -> Figure:
    figure = blank(TILE[0] / DPI, TILE[1] / DPI)
    said = shortened(name, 77)
    _write(figure, 0.1, 0.955, said, size=min(11.0, 540 / len(said)))  # as large as fits, at least 7
    _write(figure, 0.1, 0.92, " · ".join(_said(metrics)), size=9, colour=FAINT)
    _panel(figure, (0.1, 0.74), matrix, scale)
    return figure


def _write(figure: Figure, left: float, height: float, text: str, size: float = 11, colour: str = INK) -> None:
    figure.text(left, height, text, fontsize=size, color=colour, va="center", parse_math=False)


def _said(metrics: Mapping[str, float | None]) -> list[str]:
    """The metrics in a picture's title, if they are defined."""
    numbers = {"average accuracy": metrics["average_accuracy"], "forgetting": metrics["average_forgetting"]}
    return [f"{what} {percent(value, 1)} %" for what, value in numbers.items() if value is not None]


def to_pixels(figure: Figure) -> np.ndarray:
    """The figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panel(figure: Figure, place: tuple[float, float], matrix: np.ndarray, scale: ColourScale) -> None:
    """Draw a matrix and its colour bar. `place`: left edge and width, as fractions of the figure's width."""
    left, width = place
    axes = figure.add_axes((left, 0.11, width, 0.72))
    axes.set_title(TITLES[scale], fontsize=9, color=INK, loc="left", pad=7)
    image = axes.imshow(matrix, cmap=scale.colours, vmin=scale.low, vmax=scale.high, aspect="auto")
    _label(axes, len(matrix))
    if not np.isfinite(matrix).any():
        axes.text(0.5, 0.5, "undefined", color=FAINT, fontsize=9, ha="center", va="center", transform=axes.transAxes)
    elif len(matrix) <= MAX_NUMBERED:
        _number(axes, matrix, scale)
    bar_width = 14.4 / (figure.get_figwidth() * DPI)
    bar = figure.colorbar(image, cax=figure.add_axes((left + width + bar_width, 0.11, bar_width, 0.72)))
    ticks = np.linspace(scale.low, scale.high, 5).tolist()
    bar.set_ticks(ticks, labels=[f"{percent(tick, 0)} %" for tick in ticks])
    bar.ax.tick_params(length=0, labelsize=7, labelcolor=FAINT)
    bar.ax.spines[:].set_visible(False)


def _label(axes: Axes, tasks: int) -> None:
    """Task numbers on the axes, white gaps between the cells, no frame."""
    axes.set_xlabel("on task", fontsize=8, color=FAINT)
    axes.set_ylabel("after learning task", fontsize=8, color=FAINT)
    every = math.ceil(tasks / MAX_NUMBERED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, tasks, every))
        axis.set_ticks(np.arange(1, tasks) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.5, 15 / tasks))
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=FAINT)
    axes.spines[:].set_visible(False)


def _number(axes: Axes, matrix: np.ndarray, scale: ColourScale) -> None:
    """Write each measured value in percent, dark on light or light on dark."""
    digits = 1 if len(matrix) <= 10 else 0
    size = min(11.0, 95 / len(matrix)) if digits else 110 / len(matrix)
    for row, column in np.argwhere(np.isfinite(matrix)).tolist():
        value = matrix[row, column].item()
        colour = readable_on(scale.colour(value))
        axes.text(column, row, percent(value, digits), color=colour, fontsize=size, ha="center", va="center")
