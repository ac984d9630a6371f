"""Do something at intervals while a run is busy with something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def pulse(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `beat` every `seconds` from a thread of its own while the body runs."""
    over = threading.Event()

    def go() -> None:
        while not over.wait(seconds):
            beat()

    thread = threading.Thread(target=go, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
