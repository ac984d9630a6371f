"""Show groups as one self-contained HTML page that needs no server and no network."""

import base64
import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from cl_runner.report.groups import Group, ordering, shown
from cl_runner.report.runs import LeftOut
from cl_runner.report.statistics import Summary, over_tasks
from cl_runner.report.table import Cell, Scale, Table, legend
from cl_runner.trackers.colours import ACCURACY, FORGETTING, LINES

STEP = 1e-4  # resolution of the page's matrices, which are 16-bit integers
UNMEASURED = -(2**15)
BANDS = "Bands over tasks, and bars of curves, are one standard deviation."


def make_page(
    table: Table,
    title: str,
    summary: str,
    out: Sequence[LeftOut],
    warnings: Sequence[str],
    file_names: Sequence[str],
    picked: Sequence[Group] = (),
    curve: str | None = None,
) -> str:
    """The whole page.

    out: runs that are in no row. file_names: files beside the page; the runs' folders are one level up.
    picked: groups to mark as selected. curve: the key on the last chart's x axis.
    """
    groups = table.groups
    first = table.metrics[0]
    means = [row[first].summary.mean for row in table.rows]
    data = {
        "title": title,
        "summary": summary,
        "legend": f"{legend(table, ['std', 'interval'])} {BANDS}",
        "warnings": list(warnings),
        "files": list(file_names),
        "out": [[run.folder, run.state, run.why, run.there] for run in out],
        "colours": {"accuracy": ACCURACY, "forgetting": FORGETTING, "lines": LINES},
        "keys": [{"key": key, "name": name} for key, name in zip(groups.keys, groups.names, strict=True)],
        "metrics": [{"name": name, **vars(table.scales[name])} for name in table.metrics],
        "baseline": table.baseline,
        "range": _range([row[first].summary for row in table.rows], table.scales[first]),
        "curve": groups.keys.index(curve) if curve else None,
        "first": int(np.nanargmax(means)) if np.isfinite(means).any() else 0,
        "groups": [_group(table, group, row, group in picked) for group, row in zip(groups, table.rows, strict=True)],
    }
    assets = {"style": _asset("page.css"), "script": _asset("page.js"), "title": escape(title), "data": _embedded(data)}
    return re.sub(r"{{(\w+)}}", lambda place: assets[place[1]], _asset("page.html"))  # one pass: data may hold braces


def _group(table: Table, group: Group, row: dict[str, Cell], picked: bool) -> dict[str, Any]:
    return {
        "values": [shown(value) for value in group.values],
        "order": [ordering(value) for value in group.values],
        "label": table.groups.label(group),
        "n": len(group.runs),
        "tasks": group.num_tasks,
        "pick": picked,
        "baseline": table.baselines.get(group) is group,
        "cells": [_cell(cell) for cell in row.values()],
        "accuracy": encode(group.mean_accuracy),
        "forgetting": encode(group.mean_forgetting),
        "over": {
            "accuracy": _over([run.accuracy for run in group.runs]),
            "forgetting": _over(group.forgetting, before=1),
        },
        "runs": [
            [run.folder, run.seed, [_short(run.metrics.get(name)) for name in table.metrics]] for run in group.runs
        ],
    }


def _cell(cell: Cell) -> list[Any]:
    numbers = [_short(getattr(cell.summary, name)) for name in ("mean", "std", "sem", "low", "high")]
    difference = cell.difference
    if difference is None or not difference.n:
        return [cell.summary.n, *numbers, None]
    return [
        cell.summary.n,
        *numbers,
        [difference.n, _short(difference.mean), _short(difference.low), _short(difference.high)],
    ]


def _over(matrices: list[np.ndarray], before: int = 0) -> list[list[float | None] | None]:
    """Mean and standard deviation over seeds, one number per task; a single seed has no deviation (None)."""
    lines = over_tasks(matrices, before)
    std = lines.std(axis=0, ddof=1) if len(lines) > 1 else None
    return [[_short(v, 4) for v in part.tolist()] if part is not None else None for part in (lines.mean(axis=0), std)]


def encode(matrix: np.ndarray) -> str:
    """A matrix as base64 of little-endian 16-bit integers, row by row."""
    steps = np.where(np.isfinite(matrix), np.rint(np.nan_to_num(matrix) / STEP), UNMEASURED)
    return base64.b64encode(steps.astype("<i2").tobytes()).decode()


def _range(summaries: Sequence[Summary], scale: Scale) -> list[float]:
    """The range of the small axes in the table: all means and deviations, and intervals of three or more seeds."""
    ends = [(s.mean, s.mean) for s in summaries if s.n]
    ends += [(s.mean - s.std, s.mean + s.std) for s in summaries if s.n > 1]
    ends += [(s.low, s.high) for s in summaries if s.n > 2]
    low, high = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=1.0)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return [max(low, -1.0), min(high, 1.0)] if scale.unit == "%" else [low, high]


def _short(value: float | None, digits: int = 6) -> float | None:
    """Round to the digits that a page can show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def _embedded(data: dict[str, Any]) -> str:
    """JSON that is safe in a script element: nothing in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("cl_runner.report").joinpath(name).read_text(encoding="utf-8")
