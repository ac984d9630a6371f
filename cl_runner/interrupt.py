"""Signals that ask a run to stop: heard at once, heeded where everything that was done is saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGHUP")  # those of them that the platform has
PLAIN = (signal.SIG_DFL, signal.default_int_handler)  # handlers that end the process, as nobody else's


def same_command(rerun: bool) -> str:
    """By which what was stopped goes on: `rerun=true` would move it aside."""
    return f"the same command{' without rerun=true' if rerun else ''}"


class Stopped(KeyboardInterrupt):
    """The run has stopped because it was told to, and can go on. `status`: what the process is to exit with."""

    def __init__(self, name: str, command: str, place: str) -> None:
        super().__init__(f"stopped; {command} {place}")
        self.name = name  # of the signal
        self.status = 128 + signal.Signals[name]


class Interrupt:
    """What signals have asked of a run.

    In the body of `deferred` a signal is only noted, and `soon` called; elsewhere it ends the run on the spot, as far
    as the last checkpoint. A second Ctrl-C always does.

    SIGTERM that another handler than Python's own takes care of announces what is to come, no more: that handler is
    called once the run is saved, and if it returns the run goes on. (submitit's: a job is requeued on SIGUSR2.)
    """

    def __init__(self, rerun: bool = False) -> None:
        """`rerun`: the command that is to be given again asks for all to be done anew."""
        self.command = same_command(rerun)
        self.asked: str | None = None  # the signal that is not yet heeded
        self.stopping: str | None = None  # the signal that is ending the run
        self.place = "begins anew"  # where a run that is stopped now goes on, as far as the last checkpoint
        self.soon: Callable[[], None] = lambda: None
        self._deferred = 0
        self._before: dict[str, Any] = {}  # signal -> the handler found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers are in place inside, if this is the main thread: no other can have any. Ignored signals stay so."""
        if threading.current_thread() is threading.main_thread():
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

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait inside; nobody but `heed` looks at them afterwards."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def heed(self) -> None:
        """All is saved: stop, if that was asked for.

        Raises Stopped.
        """
        if self.asked is not None:
            name, self.asked = self.asked, None
            self._obey(name)

    def hand_on(self, stopped: Stopped) -> None:
        """Nothing of the run is left in this process: let the handler act that was there before, a launcher's."""
        before = self._before.get(stopped.name, signal.SIG_DFL)
        if before not in PLAIN:
            before(signal.Signals[stopped.name], None)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        impatient = name == "SIGINT" and "SIGINT" in (self.asked, self.stopping)
        if self.stopping is not None and not impatient:
            return
        self.soon()
        if self._deferred and not impatient:
            self.asked = name
        else:
            self._obey(name)

    def _obey(self, name: str) -> None:
        self.stopping = name
        before = self._before.get(name, signal.SIG_DFL)
        if name != "SIGTERM" or before in PLAIN:
            raise Stopped(name, self.command, self.place)
        before(signal.SIGTERM, None)  # may end the process by an exception of its own
        self.stopping = None
