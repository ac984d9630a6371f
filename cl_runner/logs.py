"""Where the project's log records go: to the terminal, and to `run.log` in a run's folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("cl_runner")


@contextmanager
def log_to(console: Console) -> Iterator[None]:
    """Show what the project logs, from INFO up, without breaking the bars on the same console."""
    handler = RichHandler(logging.INFO, console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")
    with _handled_by(handler):
        yield


class _LogFile(logging.FileHandler):
    """A file handler that ignores a full disk: the run itself will hit it and report it in one line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        ...


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Append everything that the project logs to `run.log`."""
    handler = _LogFile(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with _handled_by(handler):
        yield


@contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)  # each handler has a level of its own
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
