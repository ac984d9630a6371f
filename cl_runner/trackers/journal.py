"""Track a run in its own folder, the source of truth of which every other tracker is a view."""

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from cl_runner.folder import write_atomically, writing
from cl_runner.trackers.base import NullTracker, RunInfo

JOURNAL = "steps.jsonl"


class Journal(NullTracker):
    """Writes `steps.jsonl` during the run, and `accuracy.csv`, `accuracy.png` and `results.json` when it is done.

    Journal rows later than the checkpoint come from steps that will be repeated: `rewind` cuts them off.
    """

    def __init__(self) -> None:
        self._offset: int | None = None
        self._journal: io.FileIO | None = None
        self._run: RunInfo | None = None

    def start(self, run: RunInfo) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        with writing(run.folder / JOURNAL):
            self._journal = io.FileIO(run.folder / JOURNAL, "a")  # unbuffered: closing it has nothing left to write
        if not run.resumed:
            self.rewind(0)
        elif self._offset is not None:
            self.rewind(self._offset)

    @property
    def offset(self) -> int:
        """The journal's size in bytes, once it is safely on disk: what a checkpoint may record."""
        if self._journal is None:
            return self._offset or 0
        with writing(Path(str(self._journal.name))):
            os.fsync(self._journal.fileno())
        return self._journal.tell()

    def rewind(self, offset: int) -> None:
        """Drop the journal's rows beyond `offset` bytes; may be called before or after `start`."""
        self._offset = offset
        if self._journal is not None:
            size = os.fstat(self._journal.fileno()).st_size
            self._journal.truncate(min(offset, size))  # never extend it, which would append zero bytes
            self._journal.seek(0, os.SEEK_END)

    def step(self, row: dict[str, Any]) -> None:
        self._append(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._append(row)

    def task(self, row: dict[str, Any]) -> None:
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        if self._journal is None:
            return
        rest = memoryview(to_json(row).encode() + b"\n")
        with writing(Path(str(self._journal.name))):
            while rest:
                rest = rest[self._journal.write(rest) :]

    def finish(self, results: dict[str, Any]) -> None:
        if self._run is None:
            return
        write_atomically(self._run.folder / "results.json", to_json(results, indent=2) + "\n")
        write_accuracy(self._run.folder / "accuracy.csv", results["accuracy"])
        draw_accuracy(self._run.folder / "accuracy.png", results, self._run.scenario, self._run.name)

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's rows, without an incomplete last line from a killed process."""
    path = folder / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, in which numbers that are not finite are null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_accuracy(path: Path, accuracy: dict[str, list[list[float | None]]]) -> None:
    """Write a CSV line for each measured entry: scenario, after_task, task, accuracy; tasks are counted from 0."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["scenario", "after_task", "task", "accuracy"])
    for scenario, rows in accuracy.items():
        writer.writerows((scenario, *entry) for entry in entries(rows))
    write_atomically(path, table.getvalue())


def entries(rows: list[list[float | None]]) -> list[tuple[int, int, float]]:
    """(after_task, task, accuracy) for each measured entry of a matrix."""
    return [(i, j, value) for i, row in enumerate(rows) for j, value in enumerate(row) if value is not None]


def draw_accuracy(path: Path, results: dict[str, Any], scenario: str, name: str) -> None:
    """Draw the run's own matrix as PNG."""
    from cl_runner.trackers.drawing import drawn  # matplotlib: not before the first step
    from cl_runner.trackers.figures import accuracy_figure

    write_atomically(path, drawn(accuracy_figure(results["accuracy"][scenario], name, results["metrics"])))
