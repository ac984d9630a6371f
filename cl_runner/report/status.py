"""`cl-runner status DIR`: show every run below a folder and its state."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cl_runner.arguments import Parser
from cl_runner.errors import ConfigError
from cl_runner.folder import SIGNS, RunFolder, folders_below, moved_aside
from cl_runner.sweep import FILE, STATES, not_shared, outcome, sweeps
from cl_runner.trackers.names import percent, says_how

EVERY = 2.0  # seconds between two updates
TAIL = 1 << 16  # bytes at the journal's end that are searched first for the last task's row
BAD = ("failed", "killed")
COLOURS = {"running": "cyan", "done": "green", "failed": "bold red", "killed": "bold red", "pending": "dim"}
WORDS, NUMBERS = ("differs by", "reason"), ("task", "step", "accuracy", "last seen")  # columns
URGENCY = ("running", "failed", "killed", "pending", "done")  # what is shown first if not all fits


@dataclass(frozen=True)
class Row:
    """A row of the table: one run.

    accuracy: on the tasks learned so far. heartbeat: seconds since the epoch. words: of its command, if it was made
    alone. differs: those words, or the overrides of its sweep's job, that not all runs beside it share.
    """

    name: str
    state: str
    task: int | None = None
    num_tasks: int | None = None
    step: int | None = None
    accuracy: float | None = None
    heartbeat: float | None = None
    reason: str = ""
    words: tuple[str, ...] = ()
    differs: str = ""


def parser() -> Parser:
    parser = Parser(
        prog="cl-runner status",
        description="Show every run below a folder and its state; exit status 1 if one failed or was killed.",
    )
    parser.add_argument("folder", nargs="?", default="outputs", help="where the runs are (default: %(default)s)")
    parser.add_argument("--watch", action="store_true", help="keep updating until no run is running or pending")
    return parser


def main(argv: list[str]) -> int:
    """Print the table, or keep updating it with --watch. Exit status: 1 if a run failed or was killed, else 0.

    Raises ConfigError if the folder does not exist.
    """
    options = parser().parse_args(argv)
    root = Path(options.folder)
    if not root.is_dir():
        raise ConfigError("status", f"expected a folder, got {options.folder!r}")
    board = Board(root)
    if options.watch and Console().is_terminal:
        rows = _watch(board)
    else:
        rows = board.rows()
        terminal = Console() if Console().is_terminal else Console(width=1000)  # a pipe has no edge to break lines at
        terminal.print(_shown(rows, terminal.width))
    return int(any(row.state in BAD for row in rows))


def _watch(board: "Board") -> list[Row]:
    """Show the board until no run is running or pending, or Ctrl-C. Returns the rows last shown."""
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = sorted(board.rows(), key=lambda row: URGENCY.index(row.state))
            fits = rows[: max(1, console.height - 6)]
            live.update(_shown(fits, console.width, hidden=len(rows) - len(fits)), refresh=True)
            if not any(row.state in ("running", "pending") for row in rows):
                return rows
            try:
                time.sleep(EVERY)
            except KeyboardInterrupt:
                return rows


class Board:
    """The runs below a folder. Runs that have ended are read only once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ended: dict[Path, tuple[Any, Row]] = {}  # folder -> (what the row depends on, the row)

    def rows(self) -> list[Row]:
        """Every run, and every job of a sweep without a folder, folder by folder: first the sweeps' jobs in their own
        order, then other runs by name."""
        runs: list[Path] = []
        words: dict[Path, Sequence[str]] = {}  # of the sweeps' jobs
        errors: dict[Path, str | None] = {}
        for path, names in folders_below(self.root):
            if not SIGNS.isdisjoint(names):
                runs.append(path)
            if FILE in names:
                for sweep in sweeps(path):
                    for job in sweep.jobs:
                        folder = path / job.folder
                        words.setdefault(folder, job.overrides)  # the sweep that made a run names it, not a later one
                        errors[folder] = job.error
        number = {path: place for place, path in enumerate(words)}
        order = sorted({*runs, *words}, key=lambda path: (path.parent, number.get(path, len(number)), path.name))
        rows = {path: self._row(path, errors.get(path)) for path in order if not moved_aside(path)}
        differs = _apart({path: words.get(path, row.words) for path, row in rows.items()})
        return [replace(row, differs=differs[path]) for path, row in rows.items()]

    def _row(self, path: Path, error: str | None) -> Row:
        """`error`: what went wrong outside of the run, which may have no folder, according to its sweep."""
        status = path / "status.json"
        made_from = status.stat().st_mtime_ns if status.exists() else None, error
        if path in self._ended and self._ended[path][0] == made_from:
            return self._ended[path][1]
        try:
            row = self._read(path, error)
        except ConfigError as damaged:
            return Row(self._name(path), "failed", reason=f"{Path(damaged.field).name}: {damaged.message}")
        if row.state in ("done", "failed"):
            self._ended[path] = made_from, row
        return row

    def _read(self, path: Path, error: str | None) -> Row:
        run = RunFolder(path)
        status, (state, why) = run.status, outcome(run, error)
        return Row(
            self._name(path),
            state,
            status.get("tasks"),
            status.get("num_tasks"),
            status.get("step"),
            _accuracy(run, state),
            status.get("heartbeat") if state in ("running", "killed") else None,
            "" if state == "running" else why,
            tuple(shlex.split(status.get("command", ""))[1:]),
        )

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path != self.root else path.name


def _apart(words: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """The words of each run that say what it computes, without those that all runs beside it share."""
    apart: dict[Path, str] = {}
    words = {path: [word for word in own if not says_how(word)] for path, own in words.items()}
    for parent in {path.parent for path in words}:
        beside = [path for path in words if path.parent == parent]
        apart |= zip(beside, map(shlex.join, not_shared([words[path] for path in beside])), strict=True)
    return apart


def _accuracy(run: RunFolder, state: str) -> float | None:
    if state == "done":
        return run.results.get("metrics", {}).get("average_accuracy")
    return _last_task(run.path / "steps.jsonl").get("metrics", {}).get("average_accuracy")


def _last_task(journal: Path) -> dict[str, Any]:
    """The last task's row of a journal that a run may be writing to; {} if there is none."""
    if not journal.exists():
        return {}
    size, tail = journal.stat().st_size, TAIL
    with journal.open("rb") as file:
        while True:
            file.seek(max(0, size - tail))
            for line in reversed(file.read().splitlines()):
                if line.startswith(b'{"kind": "task"') and line.endswith(b"}"):
                    return json.loads(line)
            if tail >= size:
                return {}
            tail *= 8


def _shown(rows: list[Row], width: int, hidden: int = 0) -> Group:
    """The table and the counts; `hidden`: how many more runs there are."""
    return Group(*([_table(rows, width)] if rows else []), _counts(rows, hidden))


def _table(rows: list[Row], width: int) -> Table:
    """A table without empty columns. Names are kept whole, to be copied, if a terminal of that width has room."""
    now = time.time()
    cells = [
        {
            "run": Text(row.name),
            "differs by": Text(row.differs),
            "state": Text(row.state, COLOURS[row.state]),
            "task": "" if row.task is None else f"{row.task}/{row.num_tasks if row.num_tasks is not None else '?'}",
            "step": "" if row.step is None else f"{row.step:,}",
            "accuracy": "" if row.accuracy is None else f"{percent(row.accuracy)} %",
            "last seen": "" if row.heartbeat is None else f"{_ago(now - row.heartbeat)} ago",
            "reason": Text(row.reason),
        }
        for row in rows
    ]
    shown = [name for name in cells[0] if any(row[name] for row in cells)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    widths = {name: 16 if name in WORDS else max(len(name), *(len(row[name]) for row in cells)) for name in shown}
    whole = sum(widths.values()) + 3 * len(shown) <= width
    for name in shown:
        justify = "right" if name in NUMBERS else "left"
        table.add_column(name, justify=justify, no_wrap=name not in WORDS and (whole or name != "run"), overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in shown))
    return table


def _counts(rows: list[Row], hidden: int = 0) -> Text:
    counts = Counter(row.state for row in rows)
    parts = [Text.assemble(f"{counts[state]} ", (state, COLOURS[state])) for state in STATES if counts[state]]
    if not parts:
        return Text("no runs")
    more = f" ({hidden} not shown)" if hidden else ""
    return Text.assemble(f"{len(rows)} run{'s' * (len(rows) != 1)}: ", Text(", ").join(parts), more)


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
