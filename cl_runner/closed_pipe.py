"""Printing to a reader that may be gone: a closed pipe or terminal."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

UNREAD = (errno.EPIPE, errno.EIO)  # a pipe whose reader has ended (`| head`), a closed terminal


class _Unfailing:
    """A stream that goes silent once nobody reads it, instead of raising in whoever writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._ignore_closed_pipe():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignore_closed_pipe():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _ignore_closed_pipe(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in UNREAD:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what the stream has buffered goes there too
            os.close(nowhere)


@contextmanager
def ignore_closed_pipe() -> Iterator[None]:
    """In the body, output whose reader has gone is dropped: no run and no table ends because of it."""
    out, err = (cast(TextIO, _Unfailing(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
