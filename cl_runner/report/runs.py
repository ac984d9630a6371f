"""Read the runs below a folder: the finished ones, and the reasons why others are left out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cl_runner.errors import ConfigError
from cl_runner.folder import RESULTS_SCHEMA, SIGNS, RunFolder, folders_below
from cl_runner.metrics import from_rows
from cl_runner.sweep import FILE as SWEEPS
from cl_runner.sweep import outcome, sweeps

REPORT = "report"  # the report's own folder, beside the runs


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, from its results.json."""

    folder: str  # its path below the folder that was read
    config: dict[str, Any]
    groups: tuple[str, ...]  # shared by runs that differ only in the seed; empty: its status does not say
    finished: float  # seconds since the epoch; 0 if unknown
    beside: dict[str, Any]  # digests of a folder's images and of the code, which no hash includes; {}: unknown
    metrics: dict[str, float | None]  # by name, including seconds, seconds/<phase> and peak_memory/<phase>
    accuracy: np.ndarray  # float64 [T, T] of the run's own scenario, NaN where nothing was measured
    validation: np.ndarray | None  # the same on the validation splits; None if not measured

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def num_tasks(self) -> int:
        return len(self.accuracy)

    @property
    def is_validated(self) -> bool:
        return self.validation is not None or self.metrics.get("validation_accuracy") is not None


@dataclass(frozen=True)
class LeftOut:
    """A run below the folder, or a job of a sweep there, that is in no table."""

    folder: str
    # pending, running, failed, killed; damaged: its files cannot be read; twice: it repeats another run's work
    state: str
    why: str = ""
    there: bool = True  # the folder exists


@dataclass(frozen=True)
class Found:
    """All runs below a folder."""

    folder: Path
    runs: list[Run]
    left_out: list[LeftOut] = field(default_factory=list)


def read(folder: Path) -> Found:
    """Every run in `folder` and in the folders below it, in order of their paths.

    Raises ConfigError if none is finished.
    """
    if not folder.is_dir():
        raise ConfigError("DIR", f"expected a folder of runs, got {str(folder)!r}, which is no folder")
    read_ones: dict[Path, Run | LeftOut] = {}
    errors: dict[Path, str | None] = {}  # job's folder -> what went wrong outside of the run, for all sweeps
    damaged: list[LeftOut] = []
    for path, names in folders_below(folder):
        name = str(path.relative_to(folder))
        if path != folder and not SIGNS.isdisjoint(names):
            read_ones[path] = _read(path, name, errors.get(path))
        elif SWEEPS in names:  # comes before its jobs' folders
            try:
                errors |= {path / job.folder: job.error for sweep in sweeps(path) for job in sweep.jobs}
            except (ConfigError, OSError, KeyError, TypeError) as error:
                damaged.append(LeftOut(str(Path(name) / SWEEPS), "damaged", str(error)))
    runs = [run for run in read_ones.values() if isinstance(run, Run)]
    left_out = [run for run in read_ones.values() if isinstance(run, LeftOut)] + damaged
    for path in [path for path in errors if path not in read_ones]:
        left_out.append(LeftOut(str(path.relative_to(folder)), *outcome(RunFolder(path), errors[path]), there=False))
    if not runs:
        raise ConfigError("DIR", f"expected a folder of finished runs, got {str(folder)!r}{_instead(folder, left_out)}")
    return Found(folder, runs, left_out)


def _read(path: Path, name: str, error: str | None) -> Run | LeftOut:
    """`error`: what went wrong outside of the run, according to its sweep."""
    try:
        status = _load(path / "status.json") if (path / "status.json").exists() else {}
        if status.get("state") == "done" or RunFolder(path).done:
            return _run(name, status, _load(path / "results.json"))
    except (OSError, ValueError) as damage:
        return LeftOut(name, "damaged", str(damage))
    state, why = outcome(RunFolder(path), error)
    return LeftOut(name, state, ", ".join(filter(None, [why, _progress(status)])))


def _load(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError, which names the file, if it has none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected an object, got {type(content).__name__}")
    return content


def _run(name: str, status: dict[str, Any], results: dict[str, Any]) -> Run:
    """Raises ValueError if the results lack what a report needs."""
    if results.get("schema") != RESULTS_SCHEMA:
        raise ValueError(f"results.json: expected schema {RESULTS_SCHEMA}, got {results.get('schema')!r}")
    try:
        config, scenario = results["config"], results["config"]["stream"]["scenario"]
        return Run(
            folder=name,
            config={**config, "seed": int(config["seed"])},
            groups=tuple(status.get("groups") or ()),
            finished=status.get("finished") or 0.0,
            beside={"images": status.get("images"), **(status.get("code") or {})} if "code" in status else {},
            metrics=dict(_metrics(results)),
            accuracy=from_rows(results["accuracy"][scenario]),
            validation=_validation(results, scenario),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results.json: expected what a finished run writes, got {error!r}") from None


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield from results["metrics"].items()
    for phase, value in results.get("seconds", {}).items():
        yield ("seconds" if phase == "total" else f"seconds/{phase}"), value
    for phase, value in results.get("peak_memory", {}).items():
        yield f"peak_memory/{phase}", value


def _validation(results: Mapping[str, Any], scenario: str) -> np.ndarray | None:
    rows = (results.get("validation") or {}).get(scenario)
    matrix = from_rows(rows) if rows else None
    return matrix if matrix is not None and np.isfinite(matrix).any() else None


def _progress(status: Mapping[str, Any]) -> str:
    """How far a run has come, for people."""
    return f"{status['tasks']} of {status.get('num_tasks', '?')} tasks" if status.get("tasks") else ""


def _instead(folder: Path, left_out: list[LeftOut]) -> str:
    """What a folder without finished runs holds instead."""
    if left_out:
        states = [run.state for run in left_out]
        return ", whose runs are " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    is_run = any((folder / name).exists() for name in SIGNS)
    return f", which is a run's own: {str(folder.parent)!r} holds it" if is_run else ""
