"""How far a run has come, and when to save it next."""

import math
import time
from dataclasses import dataclass


@dataclass
class Position:
    """A run's progress."""

    tasks: int = 0  # learned
    phase: str = "begin"  # of the task after those: begin, learn or consolidate
    steps: int = 0  # by the optimizer, over all tasks
    rows: int = 0  # in the journal


class Pace:
    """When to save next: `due` is a number of steps, which the clock or a signal can bring forward to now."""

    def __init__(self, every: int | None = None, seconds: float | None = None) -> None:
        self.every, self.seconds = every, seconds
        self.cost = 0.0  # seconds that the last save took
        self.saved(steps=0)

    def saved(self, steps: int) -> None:
        self._since = time.monotonic()
        self.due = math.inf if self.every is None else steps + self.every

    def now(self) -> None:
        self.due = 0

    def look_at_the_clock(self) -> None:
        if self.seconds is not None and time.monotonic() - self._since >= self.seconds:
            self.now()

    @property
    def worth_it(self) -> bool:
        """Whether the work since the last save took ten times as long as saving it would."""
        return time.monotonic() - self._since > 10 * self.cost
