"""A folder's lock, held by one living process at a time; a dead process holds none."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from cl_runner.errors import ConfigError

LOCK = "lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
PATIENCE = 0.5  # seconds; a process that only asks who holds the lock takes it for some microseconds


class FolderInUseError(ConfigError):
    """Another living process holds the folder: `holder`, as far as it has written who it is."""

    def __init__(self, folder: Path, holder: dict[str, Any]) -> None:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'a host that it has not named')}"
        super().__init__(str(folder), f"is being run by {who}")


class Lock:
    """The file `lock` in a folder, locked in the kernel while this process holds it, with its id and host in it.

    It is a POSIX lock: released when its process ends, however that happens, not inherited by children, and visible to
    other hosts on a shared disk. Closing any descriptor of the file releases it, so a process never reopens its own.
    """

    _own: ClassVar[dict[str, int]] = {}  # path -> its holder's id: a forked child inherits the dict, but not the lock

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._key = os.path.realpath(self.path)
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises FolderInUseError, which names the holder, or OSError if the file cannot be written."""
        patient_until = time.monotonic() + PATIENCE
        while (file := self._locked()) is None:
            if (holder := self.holder) is not None and time.monotonic() > patient_until:
                raise FolderInUseError(self.path.parent, holder)
            time.sleep(0.02)
        self._file = file
        self._own[self._key] = os.getpid()
        try:
            os.ftruncate(file, 0)
            os.write(file, json.dumps(_here()).encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._file is None:
            return
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._file), self.path.stat()):  # the folder may have been moved since
                self.path.unlink()  # before unlocking, so that whoever has opened it finds it gone
        os.close(self._file)
        self._file = None
        self._own.pop(self._key, None)

    @property
    def holder(self) -> dict[str, Any] | None:
        """{"pid", "host"} of the living process that holds it, or None."""
        if self._own.get(self._key) == os.getpid():
            return _here()
        with suppress(OSError), self.path.open() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in TAKEN:
                    return _read(file.read())
        return None

    def _locked(self) -> int | None:
        """A locked descriptor of the file; None if another process holds it, or if it was removed in the meantime."""
        if self._own.get(self._key) == os.getpid():
            return None
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), self.path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in TAKEN:
                os.close(file)
                raise
        os.close(file)
        return None


def _here() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _read(content: str) -> dict[str, Any]:
    """What the holder wrote into the file; {} if it has not yet."""
    try:
        return json.loads(content)
    except ValueError:
        return {}
