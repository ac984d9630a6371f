"""Signals that ask a run to stop: noted at once, obeyed once everything done so far is saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGHUP")  # those of them that the platform has
PLAIN = (signal.SIG_DFL, signal.default_int_handler)  # Python's default handlers


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process at Ctrl-C in the body, where nothing has begun yet that could be lost.

    An exception would come out of whatever is being imported, which may swallow it or fail in a way of its own.
    """
    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    try:
        sys.stdout.flush()
        print("cl-runner: stopped", file=sys.stderr, flush=True)
    finally:  # also where the pipe is closed, or was being written to
        os._exit(128 + number)


def same_command(rerun: bool) -> str:
    """What to call the command that resumes a stopped run: with `rerun=true` it would start over."""
    return f"the same command{' without rerun=true' if rerun else ''}"


class Stopped(KeyboardInterrupt):
    """The run was told to stop, and can be resumed. `status`: the process's exit status."""

    def __init__(self, name: str, command: str, place: str) -> None:
        super().__init__(f"stopped; {command} {place}")
        self.name = name  # of the signal
        self.status = 128 + signal.Signals[name]


class Interrupt:
    """Handles the signals that ask a run, or a sweep of several in this process, to stop.

    In the body of `deferred` a signal is only noted, and `soon` is called; elsewhere it ends the run on the spot, which
    then resumes from the last checkpoint. A second Ctrl-C always does, except in what is deferred once it is stopping.

    Where SIGTERM has a handler other than Python's own, it only announces what is to come: that handler is called once
    the run is saved, and if it returns the run goes on. (submitit's does: it requeues a job on SIGUSR2.)
    """

    def __init__(self, rerun: bool = False) -> None:
        """`rerun`: whether the command has rerun=true, which must go before it is given again."""
        self.command = same_command(rerun)
        self.asked: str | None = None  # the signal that is yet to be obeyed
        self.stopping: str | None = None  # the signal that is ending the run
        self.place = "begins anew"  # where a run that is stopped now would resume
        self.soon: Callable[[], None] = lambda: None
        self._deferred = 0
        self._before: dict[str, Any] = {}  # signal -> the handler found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install the handlers for the body, in the main thread only (no other can); ignored signals stay ignored."""
        if threading.current_thread() is threading.main_thread():
            _listening.append(self)
            for name in filter(lambda name: hasattr(signal, name), STOPPING):
                before = signal.getsignal(getattr(signal, name))
                if before not in (signal.SIG_IGN, None):
                    self._before[name] = before
                    signal.signal(getattr(signal, name), self._hear)
        try:
            yield
        finally:
            for name, before in self._before.items():
                signal.signal(getattr(signal, name), before)
            if self in _listening:
                _listening.remove(self)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals for the body; after it, only `heed` acts on them."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def heed(self) -> None:
        """Stop if a signal asked for it; call when everything is saved.

        Raises Stopped, also again: where Python was in a callback, which cannot raise, the first was lost.
        """
        name, self.asked = self.stopping or self.asked, None
        if name is not None:
            self._obey(name)

    def hand_on(self, stopped: Stopped) -> None:
        """Call the handler that was there before, a launcher's, now that nothing of the run is left in this process."""
        before = self._launchers(stopped.name)
        if before not in PLAIN:
            before(signal.Signals[stopped.name], None)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        impatient = name == "SIGINT" and "SIGINT" in (self.asked, self.stopping)
        if self.stopping is not None and (self._deferred or not impatient):
            return
        self.soon()
        if self._deferred and not impatient:
            self.asked = name
        else:
            self._obey(name)

    def _obey(self, name: str) -> None:
        self.stopping = name
        before = self._launchers(name)
        if name != "SIGTERM" or before in PLAIN:
            raise Stopped(name, self.command, self.place)
        before(signal.SIGTERM, None)  # may end the process by an exception of its own
        self.stopping = None

    def _launchers(self, name: str) -> Any:
        """The handler found around the run, and around the sweep that it belongs to."""
        before = self._before.get(name, signal.SIG_DFL)
        around = getattr(before, "__self__", None)
        return around._launchers(name) if isinstance(around, Interrupt) else before


_listening: list[Interrupt] = []  # those whose handlers are installed, outermost first


def sweep_listens() -> bool:
    """Whether, outside of a run, the sweep that it belongs to handles signals in this process."""
    return bool(_listening)


def heed_all() -> None:
    """Stop, if that was asked for: of the run or, before it began, of the sweep around it.

    Raises Stopped.
    """
    for interrupt in _listening:
        interrupt.heed()
