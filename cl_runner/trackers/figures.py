"""The accuracy matrix as a picture: what was learned on the left, what was forgotten on the right.

Scales and size are fixed, so that pictures of different runs, and of different lengths of stream, compare side by side.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from cl_runner.metrics import forgetting_matrix, from_rows

SIZE = (1600, 800)  # pixels, width x height
DPI = 160
MAX_NUMBERED = 20  # tasks: beyond that a number no longer fits its cell
INK, FAINT = "#22303c", "#7b8791"

# Equal steps of OKLab lightness: equal differences look equal, and survive a print in grey.
ACCURACY = LinearSegmentedColormap.from_list(
    "accuracy", ["#ebfbf3", "#bbe8dc", "#8ad3ce", "#5abbc4", "#33a1ba", "#2085ab", "#256996", "#2c4e79", "#2a3658"]
)
GAINED = ["#2a5885", "#277bab", "#3c9fc5", "#70c0d6", "#b1dee3"]
LOST = ["#f8c9af", "#f19a74", "#dd6d49", "#bc4931", "#903029"]
FORGETTING = LinearSegmentedColormap.from_list("forgetting", [*GAINED, "#f7f7f7", *LOST])


def accuracy_figure(rows: Sequence[Sequence[float | None]], name: str, metrics: Mapping[str, float | None]) -> Figure:
    """The matrix of `rows` (null: not measured) and its forgetting, under the run's name and two of its metrics."""
    numbers = {"average accuracy": metrics["average_accuracy"], "forgetting": metrics["average_forgetting"]}
    said = [f"{what} {_percent(value, 1)} %" for what, value in numbers.items() if value is not None]
    return matrix_figure(from_rows(rows), " · ".join([name, *said]))


def matrix_figure(accuracy: Tensor, title: str) -> Figure:
    """A figure of SIZE pixels: accuracy [T, T] on a scale of 0 to 1, forgetting beside it on a scale of -1 to 1."""
    figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.05, 0.935, _shortened(title), fontsize=11, color=INK, va="center", parse_math=False)
    _panel(figure, 0.05, accuracy, "accuracy", ACCURACY, (0.0, 1.0))
    _panel(figure, 0.545, forgetting_matrix(accuracy), "forgetting since the best", FORGETTING, (-1.0, 1.0))
    return figure


def to_png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})  # same picture, same bytes
    return file.getvalue()


def to_pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panel(
    figure: Figure, left: float, matrix: Tensor, title: str, colours: Colormap, limits: tuple[float, float]
) -> None:
    axes = figure.add_axes((left, 0.11, 0.36, 0.72))
    axes.set_title(title, fontsize=9, color=INK, loc="left", pad=7)
    image = axes.imshow(matrix.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    _label(axes, len(matrix))
    if not matrix.isfinite().any():
        axes.text(0.5, 0.5, "undefined", color=FAINT, fontsize=9, ha="center", va="center", transform=axes.transAxes)
    elif len(matrix) <= MAX_NUMBERED:
        _number(axes, matrix, colours, limits)
    bar = figure.colorbar(image, cax=figure.add_axes((left + 0.37, 0.11, 0.009, 0.72)))
    ticks = np.linspace(*limits, 5).tolist()
    bar.set_ticks(ticks, labels=[f"{_percent(tick, 0)} %" for tick in ticks])
    bar.ax.tick_params(length=0, labelsize=7, labelcolor=FAINT)
    bar.ax.spines[:].set_visible(False)


def _label(axes: Axes, tasks: int) -> None:
    """Task numbers at the sides, white seams between the cells, no frame."""
    axes.set_xlabel("on task", fontsize=8, color=FAINT)
    axes.set_ylabel("after learning task", fontsize=8, color=FAINT)
    every = math.ceil(tasks / MAX_NUMBERED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, tasks, every))
        axis.set_ticks(np.arange(1, tasks) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.5, 15 / tasks))
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=FAINT)
    axes.spines[:].set_visible(False)


def _number(axes: Axes, matrix: Tensor, colours: Colormap, limits: tuple[float, float]) -> None:
    """Each measured cell's value in percent, dark on light and light on dark."""
    digits = 1 if len(matrix) <= 10 else 0
    size = min(11.0, 95 / len(matrix)) if digits else 110 / len(matrix)
    for row, column in torch.argwhere(matrix.isfinite()).tolist():
        value = matrix[row, column].item()
        colour = colours((value - limits[0]) / (limits[1] - limits[0]))
        text = _percent(value, digits)
        axes.text(column, row, text, color=_readable_on(colour), fontsize=size, ha="center", va="center")


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}".replace("-", "−")


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """White or ink, whichever has the larger WCAG contrast with `colour`."""
    linear = [c / 12.92 if c <= 0.04045 else math.pow((c + 0.055) / 1.055, 2.4) for c in colour[:3]]
    luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    ink_luminance = 0.028
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / (ink_luminance + 0.05) else INK


def _shortened(title: str, limit: int = 118) -> str:
    """The end of a title holds its numbers: what is too long loses its middle."""
    return title if len(title) <= limit else f"{title[: limit // 3]} … {title[-(limit * 2 // 3 - 3) :]}"
