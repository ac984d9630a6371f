"""Show a run on the terminal: progress bars, a line per task, tables at the end."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cl_runner.trackers.base import NullTracker, RunInfo
from cl_runner.trackers.names import is_share, percent

log = logging.getLogger("cl_runner")

Rows = list[list[float | None]]

PIPE_WIDTH = 120  # columns if there is no terminal: a log file, a CI page
BETWEEN = "evaluating and consolidating"  # what a run does when it learns no batch
LOW, HIGH = (176, 112, 64), (40, 150, 160)  # text colours of accuracy 0 and 1: legible on black and on white


def make_console() -> Console:
    """A console on the process's output; as wide as a page if that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


class TerminalTracker(NullTracker):
    """Shows a run on `console`: a line per task and, only on a terminal, progress bars.

    last_line: called for another tracker's line when the run is over. place: the job's number in its sweep, such as
    "3/16".
    """

    def __init__(
        self, console: Console | None = None, last_line: Callable[[], str] = lambda: "", place: str = ""
    ) -> None:
        self.console, self._last_line, self._place = console or Console(), last_line, place
        self._run: RunInfo | None = None
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._since = 0.0

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._since = time.monotonic()
        place = (f"   job {self._place}" if self._place else "", "dim")
        title = Text.assemble((run.name, "bold"), " (resumed)" if run.resumed else "", place)
        self.console.print(title, soft_wrap=True)
        log.debug("%s", title.plain)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._bars = {
            "tasks": self._progress.add_task("tasks  ", total=run.num_tasks, note=""),
            "batches": self._progress.add_task("batches", total=None, note=BETWEEN),
        }
        self._progress.start()

    def step(self, row: dict[str, Any]) -> None:
        if self._progress is not None:
            loss, speed = row["loss"]["total"], row["timing"]["images_per_second"]
            done, total = row["task_step"], row["task_steps"]
            note = f"loss {loss:.4g} · {speed:,.0f} images/s" if done < total else BETWEEN
            self._progress.update(self._bars["batches"], completed=done, total=total, note=note)
            self._progress.update(self._bars["tasks"], completed=row["task"])

    def task(self, row: dict[str, Any]) -> None:
        if self._run is None or self._progress is None:
            return
        self._progress.update(self._bars["tasks"], completed=row["task"] + 1)
        self._progress.reset(self._bars["batches"], note=BETWEEN)
        now = time.monotonic()
        parts = {
            "task": f"{row['task']} ({row['task'] + 1}/{row['num_tasks']})",  # numbered as in the matrices
            "accuracy": f"{percent(row['accuracy'][self._run.scenario][row['task']])} %",
            "average": f"{percent(row['metrics']['average_accuracy'])} %",
            "forgetting": f"{percent(row['metrics']['average_forgetting'])} %",
            "seconds": f"{now - self._since:.1f}",
        }
        self._since = now
        line = Text("   ").join(Text.assemble((name, "dim"), f" {value:>6}") for name, value in parts.items())
        self.console.print(line)
        log.debug("%s", line.plain)  # for run.log: the terminal shows it already

    def finish(self, results: dict[str, Any]) -> None:
        self._stop_bars()
        if self._run is not None:
            show_tables(results, self._run.scenario, self.console)

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        self._stop_bars()
        if self._run is not None:
            if failed or preempted:
                stopped = ("saved and stopped", "bold") if preempted else ("failed", "bold red")
                again = f"; go on with: {self._run.command}" if self._run.command else ""
                self.console.print(Text.assemble(stopped, again), soft_wrap=True)
            show_whereabouts(self._run.folder, self._last_line(), self.console)
            self._run = None

    def _stop_bars(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def show_results(results: dict[str, Any], folder: Path, console: Console) -> None:
    """Show a finished run as when it ended; `results` is the content of results.json."""
    show_tables(results, results["config"]["stream"]["scenario"], console)
    show_whereabouts(folder, "", console)


def show_tables(results: dict[str, Any], scenario: str, console: Console) -> None:
    """Show the run's own accuracy matrix, every defined metric, and the seconds by phase."""
    rows = results["accuracy"][scenario]
    digits = next((digits for digits in (1, 0) if _matrix_width(len(rows), digits) <= console.width), None)
    console.print(_per_task(rows) if digits is None else _matrix(rows, digits, f"accuracy, {scenario}, %"))
    console.print(_metrics(results["metrics"], [scenario, *(name for name in results["accuracy"] if name != scenario)]))
    phases = {phase: f"{phase} {value:.1f}" for phase, value in results["seconds"].items()}
    fisher = phases.pop("fisher", "")  # part of other phases, so not to be added to them
    seconds = " · ".join(phases.values()) + (f" ({fisher})" if fisher else "")
    console.print(Text.assemble(("seconds  ", "dim"), seconds), soft_wrap=True)


def show_whereabouts(folder: Path, last_line: str, console: Console) -> None:
    """Show the run's folder and W&B's line, unwrapped so that they can be copied."""
    console.print(Text.assemble(("folder   ", "dim"), str(folder)), soft_wrap=True)
    if last_line:
        console.print(Text(last_line), soft_wrap=True)


def _matrix_width(tasks: int, digits: int) -> int:
    return 9 + tasks * (len(percent(1.0, digits)) + 2)


def _matrix(rows: Rows, digits: int, title: str) -> Table:
    """A row per task learned, a column per task measured; the diagonal is bold."""
    table = Table(box=SIMPLE_HEAD, title=title, title_style="bold", title_justify="left")
    table.add_column("after", justify="right", style="dim")
    for task in range(len(rows)):
        table.add_column(str(task), justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = (_cell(value, digits, bold=i == j) for j, value in enumerate(row))
        table.add_row(str(i), *cells)
    return table


def _cell(value: float | None, digits: int, bold: bool) -> Text:
    if value is None:
        return Text("")
    red, green, blue = (round(low + value * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return Text(percent(value, digits), Style(color=f"rgb({red},{green},{blue})", bold=bold))


def _per_task(rows: Rows) -> Table:
    """For a matrix that is too wide: each task's accuracy when it was learned, and at the end."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("task", "learned, %", "in the end, %"):
        table.add_column(name, justify="right")
    for task, end in enumerate(rows[-1]):
        table.add_row(str(task), _cell(rows[task][task], 1, bold=False), _cell(end, 1, bold=False))
    return table


def _metrics(metrics: dict[str, float | None], scenarios: list[str]) -> Table:
    """A row per defined metric, a column per scenario; the run's own comes first, with metrics of no scenario."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric")
    for scenario in scenarios:
        table.add_column(scenario, justify="right")
    defined = {name.partition("/")[0] for name, value in metrics.items() if value is not None}
    for name in (name for name in metrics if name in defined):
        rest = [_value(name, metrics[key]) if (key := f"{name}/{other}") in metrics else "" for other in scenarios[1:]]
        table.add_row(name, _value(name, metrics[name]), *rest)
    return table


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{percent(value)} %" if is_share(name) else f"{value:.4g}"
