"""What the process prints, where nobody may read it any more."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

UNREAD = (errno.EPIPE, errno.EIO)  # a pipe whose reader has ended (`| head`), a terminal that was closed


class _Unfailing:
    """A stream that says no more once nobody reads it, where it would fail whoever writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._read_or_not():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._read_or_not():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _read_or_not(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in UNREAD:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what the stream still holds back goes there, too
            os.close(nowhere)


@contextmanager
def read_or_not() -> Iterator[None]:
    """Inside, no run and no table ends because a reader does: what is printed then goes nowhere."""
    out, err = (cast(TextIO, _Unfailing(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
