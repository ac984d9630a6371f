"""A run's folder: its files, the state of its run, and how files are written so that none is ever torn."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from cl_runner.errors import ConfigError
from cl_runner.lock import LOCK, Lock

log = logging.getLogger("cl_runner")

RESULTS_SCHEMA = 1  # of results.json
SIGNS = {"status.json", "results.json"}  # a folder with either of these is a run's
LASTING = ("id", "task", "tasks", "num_tasks", "step")  # what a status keeps when the run resumes
DRAFT = re.compile(r"\..+\.\d+")


class CannotWriteError(OSError):
    """A file or folder cannot be written, because the disk is full, say."""


class RunFolder:
    """The folder of one run. Its `status.json`, with the lock that a living run holds, is the truth about the run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._updating = threading.Lock()  # a run's pulse writes the status too

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json")

    @property
    def state(self) -> str:
        """pending, running, done, failed, or killed: its status says running, but no living process holds its lock."""
        if self.done:
            return "done"
        if self.held is not None:
            return "running"
        said: str = self.status.get("state", "pending")
        return {"running": "killed", "done": "pending"}.get(said, said)

    @property
    def held(self) -> dict[str, Any] | None:
        """{"pid", "host"} of the living process that runs it, or None."""
        return Lock(self.path).holder

    @property
    def done(self) -> bool:
        """Whether it has results that no later run is replacing; a status that was deleted is not missed."""
        return self.status.get("state", "done") == "done" and (self.path / "results.json").exists()

    @property
    def results(self) -> dict[str, Any]:
        return read_json(self.path / "results.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, which every write to it needs; the folder is created if it is missing.

        Raises FolderInUseError if another living process holds it, and CannotWriteError if the folder cannot be made.
        """
        lock = Lock(self.path)
        with writing(self.path):
            while True:
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                    break
                except FileNotFoundError:  # another process moved the folder aside in the meantime
                    continue
        try:
            yield
        finally:
            lock.release()

    def start(self, **fields: Any) -> None:
        """Note that the run starts or resumes; of the earlier status, its id and its progress are kept."""
        self._remove_drafts()
        kept = {key: value for key, value in self.status.items() if key in LASTING}
        now = time.time()
        status = {**kept, "state": "running", "started": now, "heartbeat": now, **fields}
        write_atomically(self.path / "status.json", json.dumps(status, indent=2))

    def update_status(self, **fields: Any) -> None:
        with self._updating:
            write_atomically(self.path / "status.json", json.dumps({**self.status, **fields}, indent=2))

    def beat(self, **fields: Any) -> None:
        """Write a sign of life. A full disk is ignored here: the run itself will hit it, if it lasts."""
        with suppress(CannotWriteError):
            self.update_status(heartbeat=time.time(), **fields)

    def stop(self, why: str) -> None:
        """Note that the run was told to stop, and can be resumed."""
        log.debug("stopped by %s", why)
        self.update_status(state="pending", stopped=why, heartbeat=time.time())

    def fail(self, error: BaseException, trace: str) -> None:
        """Note what ended the run, if that can be written; the traceback is in `run.log` too."""
        log.debug("%s", trace)
        with suppress(CannotWriteError):
            self.update_status(state="failed", error=f"{type(error).__name__}: {error}", traceback=trace)

    def write_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration, as YAML."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def move_aside(self) -> Path | None:
        """Rename the folder, contents and all, to the first free `<name>.<n>`.

        Returns the new path, or None where there is nothing to keep. Raises FolderInUseError.
        """
        if not self.path.exists():
            return None
        with self.locked():
            if all(path.name == LOCK for path in self.path.iterdir()):  # another process moved it just now
                return None
            number = 1
            while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(target)
            Lock(target).path.unlink()
        return target

    def _remove_drafts(self) -> None:
        """Remove what a killed process was writing; no living process is, since the lock is held."""
        for draft in (*self.path.glob(".*"), *self.path.glob("checkpoint/.*")):
            if DRAFT.fullmatch(draft.name):
                draft.unlink()


def folders_below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """`root` and the folders below it, with the names in each, in order of their paths.

    Runs' own folders, hidden ones and symbolic links are not searched; a link to a run counts as that run, which is
    given once, as itself if it is here too. Runs that were moved aside are left out.
    """
    found = list(_below(root))
    linked = {path for path, names in found if path != root and path.is_symlink() and not SIGNS.isdisjoint(names)}
    given = {path.resolve() for path, names in found if path not in linked and not SIGNS.isdisjoint(names)}
    for path, names in found:
        if path not in linked or path.resolve() not in given:
            given.add(path.resolve())
            yield path, names


def _below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    names = _names_in(root)
    yield root, names
    if not SIGNS.isdisjoint(names):
        return
    for path in [root / name for name in names if not name.startswith(".")]:
        is_run = path.is_dir() and not SIGNS.isdisjoint(_names_in(path))
        if path.is_dir() and not (moved_aside(path) if is_run else path.is_symlink()):
            yield from _below(path)


def _names_in(folder: Path) -> list[str]:
    """None for a folder that may not be read, or that has been moved aside in the meantime."""
    try:
        return sorted(os.listdir(folder))
    except (PermissionError, FileNotFoundError):
        return []


def moved_aside(path: Path) -> bool:
    """Whether a run's folder is one that was kept when the run was made again."""
    return path.suffix[1:].isdigit() and path.with_suffix("").is_dir()


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, or {} if there is no file.

    Raises ConfigError if it is damaged from outside: what this project writes is never torn.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(
            str(path), "expected JSON, got a damaged file; delete it, and the run's command resumes or repeats it"
        )
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file atomically: a reader sees either the old content or the new, whatever happens.

    Raises CannotWriteError, and then leaves the file as it was.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file that atomically replaces `path` once all of it is on disk.

    `keep`: where to move the previous file. Raises CannotWriteError, and then leaves the file as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with draft.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            draft.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a CannotWriteError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CannotWriteError):
            raise
        raise CannotWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Sync the folder: a new name is on disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
