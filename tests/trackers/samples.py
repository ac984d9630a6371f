"""One small run as trackers are told about it: three tasks of four steps, class-incremental; the last task is evaluated
half-way too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cl_runner import metrics
from cl_runner.trackers import base
from cl_runner.trackers.base import RunInfo, Tracker

CLASS = np.array([[0.9, 0.0, 0.0], [0.61, 0.8, 0.0], [0.52, 0.73, 0.64]])
CLASS[CLASS == 0] = np.nan
ACCURACY = {"class": CLASS, "task": CLASS + 0.05}
SIZES = np.full(3, 10.0)
ROWS_BEFORE_THE_END_OF_TASK_1 = 7


def run_info(folder: Path, resumed: bool = False, run_id: str = "abc123") -> RunInfo:
    config = {
        "seed": 0,
        "strategy": {"_target_": "cl_runner.strategies.EWC", "strength": 100.0},
        "stream": {"_target_": "cl_runner.streams.split.Split", "name": "digits", "scenario": "class"},
        "model": {"_target_": "cl_runner.models.MLP"},
    }
    return RunInfo(
        folder=folder,
        name="ewc strength=100 · split_digits · s0",
        group="ewc-12ab34cd",
        id=run_id,
        config=config,
        num_tasks=3,
        scenario="class",
        resumed=resumed,
        command="cl-runner strategy=ewc",
    )


def journal_rows() -> list[dict[str, Any]]:
    return [{"seq": seq, **row} for seq, row in enumerate(_rows())]


def _rows() -> Iterator[dict[str, Any]]:
    for task in range(3):
        for step in range(4):
            yield {
                "kind": "step",
                "task": task,
                "epoch": 0,
                "step": 4 * task + step + 1,
                "task_step": step + 1,
                "task_steps": 4,
                "loss": {"total": 1.5, "task": 1.0, "ewc": 0.5},
                "lr": 0.1,
                "timing": {"time": 1.7e9 + step, "images_per_second": 1234.5},
            }
            if (task, step) == (2, 1):
                accuracy = {"class": [0.3, 0.4, 0.5], "task": [0.8, 0.9, None]}
                place, timing = {"task": 2, "step": 10, "task_step": 2}, {"time": 1.7e9}
                yield {"kind": "eval", **place, "accuracy": accuracy, "timing": timing}
        rows = {name: metrics.to_rows(matrix)[task] for name, matrix in ACCURACY.items()}
        yield {
            "kind": "task",
            "task": task,
            "num_tasks": 3,
            "step": 4 * task + 4,
            "accuracy": rows,
            "metrics": metrics.summarise(ACCURACY, {}, "class", task + 1, SIZES[: task + 1]),
            "timing": {"seconds": {"train": 1.5, "evaluate": 0.25}},
        }


def results() -> dict[str, Any]:
    return {
        "schema": 1,
        "config": {"stream": {"scenario": "class"}},
        "environment": {"torch": "2"},
        "metrics": {**metrics.summarise(ACCURACY, {}, "class", 3, SIZES), "drift_kl": 0.0321},
        "accuracy": {name: metrics.to_rows(matrix) for name, matrix in ACCURACY.items()},
        "zero_shot": {},
        "seconds": {"train": 4.5, "evaluate": 0.75},
        "peak_memory": {"train": 123456},
    }


def tell(tracker: Tracker, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        base.tell(tracker, row)
