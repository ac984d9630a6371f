"""Draw groups: matrices side by side, accuracy and forgetting over the tasks, curves over a swept key."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from cl_runner.report.groups import ABSENT, Group, Groups, Value, is_number, ordering, short_names, shown
from cl_runner.report.statistics import over_tasks, summarise
from cl_runner.report.table import SPREADS, Scale
from cl_runner.trackers.colours import FAINT, INK, LINES
from cl_runner.trackers.drawing import ACCURACY, FORGETTING, ColourScale, blank, readable_on, shortened, wrapped

HEAD = 0.5  # inches above the matrices
MOST_MATRICES = 48  # groups in one picture; the page shows all
MOST_NUMBERED = 12  # groups up to which matrices have numbers in their cells
MOST_LINES = 10  # up to which each has a colour; beyond, each strategy has one
MOST_NAMES = 20  # in the legend
DASHES = [(0, (5, 3)), (0, (2, 2)), (0, (8, 3, 2, 3)), (0, (1, 2))]
LOG_FROM = 20  # a swept key's axis is logarithmic if its largest value is so many times its smallest
PERCENT = Scale(100, "%", 1)
Picture = tuple[str, Figure]  # file name without suffix, and figure
Align = Literal["left", "center", "right"]


@dataclass(frozen=True)
class Kind:
    """A matrix that every group has, and its colour scale."""

    name: str
    of: Callable[[Group], np.ndarray]
    scale: ColourScale


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture, in inches from its top left."""

    left: float
    top: float
    width: float
    height: float


def draw(groups: Groups, curves: Sequence[str], spread: str = "std") -> list[Picture]:
    """Every picture of a report: matrices, accuracy and forgetting over tasks, and a curve for each key in `curves`.

    curves: keys of the groups. spread: what bands and bars show: std, sem or interval.
    """
    pictures = [("matrices", matrices(groups)), ("accuracy", accuracy_over_tasks(groups, spread))]
    if any(np.isfinite(group.mean_forgetting).any() for group in groups):
        pictures.append(("forgetting", forgetting_over_tasks(groups, spread)))
    return pictures + [_curve_picture(groups, key, spread) for key in curves]


def matrices(groups: Groups) -> Figure:
    """The mean accuracy and forgetting matrices of every group, on the same two colour scales."""
    pictured = list(groups)[:MOST_MATRICES]
    numbered = len(pictured) <= MOST_NUMBERED
    columns = min(len(pictured), 2 if numbered else 4)
    rows = math.ceil(len(pictured) / columns)
    wide, high, margin = (6.2, 3.0, 0.25) if numbered else (3.1, 1.75, 0.15)  # inches for a group's two matrices
    figure = blank(wide * columns, high * rows + HEAD)
    axes = _inches(figure)
    left_out = f" · {len(groups) - len(pictured)} groups more in the page" if len(groups) > len(pictured) else ""
    what = f"column: on task · row: after learning task · means over seeds{left_out}"
    _text(axes, margin, HEAD / 2, what, 8, FAINT)
    kinds = (
        Kind("accuracy", lambda group: group.mean_accuracy, ACCURACY),
        Kind("forgetting", lambda group: group.mean_forgetting, FORGETTING),
    )
    for index, group in enumerate(pictured):
        row, column = divmod(index, columns)
        left, top = column * wide + margin, HEAD + row * high
        label = wrapped(groups.label(group), 74 if numbered else 46)
        _text(axes, left, top + 0.09 * high, label, 9 if numbered else 7, INK)
        for half, kind in enumerate(kinds):
            box = Box(left + half * 0.49 * wide, top + 0.17 * high, 0.44 * wide, 0.77 * high)
            _heat(axes, box, kind, kind.of(group), numbered)
    for half, kind in enumerate(kinds):
        _scale(axes, kind, wide * columns - margin - 2.4 * (1 - half) - 1.0)
    return figure


def accuracy_over_tasks(groups: Groups, spread: str = "std") -> Figure:
    """The mean accuracy on the tasks so far, after each task: mean over seeds, with a band."""
    lines = {group: over_tasks([run.accuracy for run in group.runs]) for group in groups}
    return _lines(groups, lines, "accuracy on the tasks so far, %", spread)


def forgetting_over_tasks(groups: Groups, spread: str = "std") -> Figure:
    """The mean forgetting of the tasks before it, after each task: mean over seeds, with a band."""
    lines = {group: over_tasks(group.forgetting, before=1) for group in groups}
    return _lines(groups, lines, "forgetting, %", spread)


def curve(groups: Groups, key: str, spread: str = "std") -> Figure:
    """Final accuracy and forgetting over a swept key, with error bars and a line for each setting of the other keys.

    A group without the key (finetune has no strength, say) is a horizontal line.
    """
    figure = blank(12.5, 4.2)
    others = [other for other in groups.keys if other != key]
    names = dict(zip(others, short_names(others), strict=True))
    lines: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        said = [
            shown(group.values[0]) if other == "strategy" else f"{names[other]}={shown(groups.value(group, other))}"
            for other in others
            if groups.value(group, other) != ABSENT
        ]
        lines[" ".join(said) or "all"].append(group)
    values = sorted({groups.value(group, key) for group in groups} - {ABSENT}, key=ordering)
    places = _places(values)
    many = len(lines) > 2 * len(LINES)
    strategies = list(dict.fromkeys(members[0].values[0] for members in lines.values()))
    styles = [strategies.index(own[0].values[0]) if many else number for number, own in enumerate(lines.values())]
    for index, (metric, label) in enumerate(
        [("average_accuracy", "average accuracy, %"), ("average_forgetting", "average forgetting, %")]
    ):
        axes = figure.add_axes((0.055 + 0.36 * index, 0.14, 0.3, 0.78))
        for number, (name, members) in zip(styles, lines.items(), strict=True):
            called = shown(members[0].values[0]) if many else wrapped(name, 46, lines=3)
            _curve_line(axes, groups, members, key, metric, spread, places, called, number)
        _dress(axes, names.get(key, key.rpartition(".")[2]), f"{label}{_beside(groups, spread)}")
        _mark(axes, values, places)
    _legend(figure, *figure.axes[0].get_legend_handles_labels(), 0.735)
    return figure


def _curve_picture(groups: Groups, key: str, spread: str) -> Picture:
    return f"curve-{re.sub(r'[^A-Za-z0-9]+', '-', key)}", curve(groups, key, spread)


def _curve_line(
    axes: Axes,
    groups: Groups,
    members: Sequence[Group],
    key: str,
    metric: str,
    spread: str,
    places: dict[Value, float],
    name: str,
    number: int,
) -> None:
    summaries = [(groups.value(group, key), group.summary(metric)) for group in members]
    there = [(value, summary) for value, summary in summaries if summary.n]
    level = [summary for value, summary in there if value == ABSENT]
    points = sorted((places[value], summary.mean, summary.half(spread)) for value, summary in there if value != ABSENT)
    if level:
        axes.axhline(
            100 * level[0].mean, label=name, linestyle=DASHES[number % len(DASHES)], linewidth=1.2, color=FAINT
        )
    elif points:
        x, mean, half = np.array(points).T
        error = np.nan_to_num(100 * half)
        axes.errorbar(x, 100 * mean, error, label=name, capsize=2.5, markersize=4.5, linewidth=1.4, **_style(number))


def _places(values: Sequence[Value]) -> dict[Value, float]:
    """x coordinates: numbers at their value, words one after another."""
    numbers = [float(value) for value in values if is_number(value)]
    return dict(zip(values, numbers if len(numbers) == len(values) else map(float, range(len(values))), strict=True))


def _mark(axes: Axes, values: Sequence[Value], places: dict[Value, float]) -> None:
    """Set the x axis up: logarithmic from a factor of LOG_FROM on, with zero to the left of the rest."""
    positive = [value for value in places.values() if value > 0]
    if not all(is_number(value) for value in values):
        axes.set_xticks(list(places.values()), [shortened(shown(value), 18) for value in values])
    elif positive and min(places.values()) >= 0 and max(positive) / min(positive) >= LOG_FROM:
        axes.set_xscale("log") if len(positive) == len(values) else axes.set_xscale("symlog", linthresh=min(positive))
        if len(values) <= 9:
            axes.set_xticks(list(places.values()), [shown(value) for value in values])
            axes.minorticks_off()


def _beside(groups: Groups, spread: str) -> str:
    """What bands and bars show, if there are any."""
    return f"\n({SPREADS[spread].strip()})" if any(len(group.runs) > 1 for group in groups) else ""


def _lines(groups: Groups, lines: dict[Group, np.ndarray], label: str, spread: str) -> Figure:
    """lines: group -> [seeds, T]. Few groups get a colour and a band each; with many, each strategy gets a colour."""
    figure = blank(9.0, 4.4)
    axes = figure.add_axes((0.075, 0.13, 0.6, 0.81))
    if len(groups) > MOST_LINES:
        _many_lines(axes, groups, lines)
    else:
        _few_lines(axes, groups, lines, spread)
        label += _beside(groups, spread)
    _dress(axes, "after learning task", label)
    longest = max(group.num_tasks for group in groups)
    axes.set_xticks(range(0, longest, math.ceil(longest / 20)))
    _legend(figure, *axes.get_legend_handles_labels(), 0.69)
    return figure


def _few_lines(axes: Axes, groups: Groups, lines: dict[Group, np.ndarray], spread: str) -> None:
    for number, group in enumerate(groups):
        summaries = [summarise(values) for values in lines[group].T.tolist()]
        mean = 100 * np.array([summary.mean for summary in summaries])
        half = 100 * np.nan_to_num([summary.half(spread) for summary in summaries])
        tasks, style = range(len(mean)), _style(number)
        axes.plot(tasks, mean, label=wrapped(groups.label(group), 40, lines=3), linewidth=1.6, markersize=4, **style)
        axes.fill_between(tasks, mean - half, mean + half, color=style["color"], alpha=0.13, linewidth=0)


def _many_lines(axes: Axes, groups: Groups, lines: dict[Group, np.ndarray]) -> None:
    for number, strategy in enumerate(dict.fromkeys(group.values[0] for group in groups)):
        means = [100 * lines[group].mean(axis=0) for group in groups if group.values[0] == strategy]
        drawn = LineCollection([np.column_stack([range(len(mean)), mean]) for mean in means], linewidths=0.7)
        drawn.set(color=LINES[number % len(LINES)], label=shown(strategy))
        axes.add_collection(drawn)
    axes.autoscale_view()


def _inches(figure: Figure) -> Axes:
    """Axes in inches from the picture's top left, for all matrices: one each would take seconds."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def _heat(axes: Axes, box: Box, kind: Kind, matrix: np.ndarray, numbered: bool) -> None:
    """Draw a matrix with gaps between its cells, and numbers in them if they fit."""
    size = len(matrix)
    if not np.isfinite(matrix).any():
        _text(axes, box.left + box.width / 2, box.top + box.height / 2, "undefined", 8, FAINT, "center")
        return
    rows, columns = np.nonzero(np.isfinite(matrix))
    colours = kind.scale.colour(matrix[rows, columns])
    width, height = box.width / size, box.height / size
    _cells(axes, box.left + width * columns, box.top + height * rows, width, height, colours, seam=0.012)
    if not numbered or size > 10:
        return
    for row, column, colour in zip(rows.tolist(), columns.tolist(), colours, strict=True):
        x, y = box.left + width * (column + 0.5), box.top + height * (row + 0.5)
        _text(axes, x, y, PERCENT.text(matrix[row, column]), min(8.5, 58 / size), readable_on(colour), "center")


def _cells(
    axes: Axes, left: np.ndarray, top: np.ndarray, width: float, height: float, colours: np.ndarray, seam: float = 0.0
) -> None:
    """Draw rectangles, with a gap of `seam` on the right and at the bottom of each."""
    right, bottom = left + width - min(seam, width / 4), top + height - min(seam, height / 4)
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)
    axes.add_collection(PolyCollection(list(corners), facecolors=colours, antialiased=False, linewidths=0))


def _scale(axes: Axes, kind: Kind, left: float) -> None:
    """Draw a colour bar at the top, with its limits."""
    steps = np.linspace(0, 0.7, 64, endpoint=False)
    limits = kind.scale.low, kind.scale.high
    colours = kind.scale.colour(np.linspace(*limits, len(steps)))
    _cells(axes, left + steps, np.full_like(steps, HEAD / 2 - 0.045), 0.7 / len(steps), 0.09, colours)
    low, high = (f"{100 * limit:.0f}".replace("-", "−") for limit in limits)
    _text(axes, left - 0.06, HEAD / 2, f"{kind.name}, %   {low}", 7, FAINT, "right")
    _text(axes, left + 0.76, HEAD / 2, high, 7, FAINT)


def _style(number: int) -> dict[str, Any]:
    """Colour and marker of a line; the marker changes once all colours are used."""
    return {"color": LINES[number % len(LINES)], "marker": "osD^v"[(number // len(LINES)) % 5]}


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    axes.grid(color="#e6eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], left: float) -> None:
    once = {label: handle for handle, label in zip(handles, labels, strict=True)}  # several lines may share a name
    names = [*list(once)[: MOST_NAMES - 1], f"and {len(once) - MOST_NAMES + 1} more"]
    names = list(once) if len(once) <= MOST_NAMES else names
    drawn = list(once.values())[: len(names)]
    figure.legend(drawn, names, loc="upper left", bbox_to_anchor=(left, 0.96), fontsize=7.5, frameon=False)


def _text(axes: Axes, left: float, top: float, text: str, size: float, colour: str, align: Align = "left") -> None:
    axes.text(left, top, text, fontsize=size, color=colour, va="center", ha=align, parse_math=False)
