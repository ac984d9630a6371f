"""Seconds and peak memory by phase."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds and peak memory by phase; time in a nested phase counts for the inner phase alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}
        self._phase: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: str | None) -> None:
        """Book the time so far to the phase that ends or pauses here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._phase is not None:
            self.add({self._phase: now - self._since}, {self._phase: self._peak()})
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._phase, self._since = phase, now

    def add(self, seconds: dict[str, float], peak_memory: dict[str, int]) -> None:
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        for phase, value in peak_memory.items():
            self.peak_memory[phase] = max(self.peak_memory.get(phase, 0), value)

    def _peak(self) -> int:
        """Bytes: on CUDA the most that tensors took in this phase, elsewhere the most that the process has taken."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on every platform

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
