"""The content of pictures."""

import numpy as np
import pytest
from PIL import Image

from cl_runner.report.groups import group_runs
from cl_runner.report.pictures import HEAD, accuracy_over_tasks, curve, matrices
from cl_runner.report.runs import read
from cl_runner.report.table import SPREADS
from cl_runner.trackers.drawing import DPI, drawn
from tests.report.samples import config, write


def grouped(folder):
    return group_runs(read(folder).runs)


@pytest.fixture
def sweep(tmp_path):
    for seed in (0, 1):
        for strength, accuracy in ((1.0, 0.5), (100.0, 0.7), (1e4, 0.6)):
            write(tmp_path, config("EWC", seed, strength=strength), accuracy + 0.02 * seed)
        write(tmp_path, config("Finetune", seed), 0.3)
    return grouped(tmp_path)


def test_a_curve_runs_over_the_values_of_its_key_with_the_bars_asked_for(sweep):
    axes = curve(sweep, "strategy.strength", "sem").axes[0]
    (line, _, (bars,)) = axes.containers[0]
    assert line.get_xdata().tolist() == [1.0, 100.0, 1e4]
    assert line.get_ydata().tolist() == pytest.approx([51.0, 71.0, 61.0])
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((50.0, 52.0))  # seeds 50 and 52: the standard error is 1
    assert axes.get_xscale() == "log"


def test_a_group_without_the_key_is_a_level_line(sweep):
    axes = curve(sweep, "strategy.strength").axes[0]
    (level,) = [line for line in axes.lines if line.get_label() == "finetune"]
    assert set(level.get_ydata()) == {30.0}


def test_a_key_of_words_has_a_place_for_each(tmp_path):
    for anchor in ("previous", "both"):
        write(tmp_path, config("EWC", anchor=anchor))
    axes = curve(grouped(tmp_path), "strategy.anchor").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["both", "previous"]
    assert axes.get_xscale() == "linear"


def test_zero_has_a_place_beside_a_logarithmic_axis(tmp_path):
    for strength in (0.0, 1.0, 1000.0):
        write(tmp_path, config("EWC", strength=strength))
    axes = curve(grouped(tmp_path), "strategy.strength").axes[0]
    assert axes.get_xscale() == "symlog"


@pytest.mark.parametrize(("spread", "half"), [("std", 10.0), ("sem", 10 / 3**0.5), ("interval", 24.841)])
def test_bars_and_bands_are_the_spread_that_was_asked_for_and_say_so(tmp_path, spread, half):
    for strength in (1.0, 2.0):
        for seed, accuracy in enumerate((0.4, 0.5, 0.6)):
            rows = [[accuracy, None], [accuracy, accuracy]]
            write(tmp_path, config("EWC", seed, strength=strength), accuracy, rows=rows)
    groups = grouped(tmp_path)
    curves, bands = curve(groups, "strategy.strength", spread).axes[0], accuracy_over_tasks(groups, spread).axes[0]
    for bar in curves.containers[0].lines[2][0].get_segments():
        assert (bar[1][1] - bar[0][1]) / 2 == pytest.approx(half, abs=1e-3)
    heights = bands.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.max() - heights.min()) / 2 == pytest.approx(half, abs=1e-3)
    for axes in (curves, bands):
        assert SPREADS[spread].strip() in axes.get_ylabel()


def test_accuracy_over_tasks_is_that_of_the_tasks_so_far(tmp_path):
    for seed in (0, 1):
        write(tmp_path, config(seed=seed))
    axes = accuracy_over_tasks(grouped(tmp_path)).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([90, 75, 70])


def test_a_legend_tells_all_groups_apart_however_long_their_names(tmp_path):
    for strength in (1.0, 1e3, 1e5):
        for accumulation in ("separate", "sum"):
            settings = {"strength": strength, "accumulation": accumulation, "normalisation": "of all parameters"}
            write(tmp_path, config("EWC", 0, **settings, decay=0.95 if accumulation == "sum" else 1.0), 0.5)
    groups = grouped(tmp_path)
    (legend,) = accuracy_over_tasks(groups).legends
    names = [" ".join(text.get_text().split()) for text in legend.get_texts()]
    assert names == [groups.label(group) for group in groups]


def test_many_groups_share_a_colour_a_strategy(tmp_path):
    for lr in np.linspace(0.1, 1, 12):
        write(tmp_path, config("EWC", lr=float(lr)))
    axes = accuracy_over_tasks(grouped(tmp_path)).axes[0]
    (lines,) = axes.collections
    assert len(lines.get_paths()) == 12
    assert lines.get_label() == "ewc"


def test_the_colours_of_matrices_mean_the_same_in_every_group(tmp_path):
    for lr, value in ((0.1, 0.0), (0.2, 1.0)):
        write(tmp_path, config(lr=lr), rows=[[value, None], [value, value]])
    first, *_, last = [kind for kind in matrices(grouped(tmp_path)).axes[0].collections if len(kind.get_paths()) == 3]
    assert (255 * first.get_facecolor()[0, :3]).round().tolist() == [0xEB, 0xFB, 0xF3]
    assert (255 * last.get_facecolor()[0, :3]).round().tolist() == [0x2A, 0x36, 0x58]


def test_the_same_picture_has_the_same_bytes(sweep, tmp_path):
    one, other = (drawn(matrices(sweep)) for _ in range(2))
    assert one == other
    (tmp_path / "matrices.png").write_bytes(one)
    assert Image.open(tmp_path / "matrices.png").size == (round(2 * 6.2 * DPI), round((2 * 3.0 + HEAD) * DPI))


@pytest.mark.parametrize("spread", SPREADS)
def test_what_an_axis_shows_is_within_the_picture(sweep, spread):
    for figure in (accuracy_over_tasks(sweep, spread), curve(sweep, "strategy.strength", spread)):
        figure.canvas.draw()
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            box = axes.yaxis.label.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height
