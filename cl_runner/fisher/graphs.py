"""Work that repeats itself, queued by Python once and then replayed as a CUDA graph."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor


class Replayed:
    """`function`, which works by its effects: run as it is the first time, captured the second, replayed from then on.

    Each call has the function's effect once. The first warms up what may not happen during a capture: kernels compiled
    and timed, libraries loaded. Call it within `side_stream`, where the leaves must have been made and the forward pass
    have run too, since autograd runs a backward pass on its forward's stream. What the function reads and adds to must
    stay where it is in memory for as long as this object is called, and it must not wait for the device. Off CUDA,
    and where the memory that a graph keeps to itself is not to be had, calls go straight through.

    Args:
        function: of one tensor, which it must not change.
        example: of the shape, dtype and device of all the tensors to come.
        forget: lets go of what a call of the function that ended early has left in Python's hands.
    """

    def __init__(
        self, function: Callable[[Tensor], object], example: Tensor, forget: Callable[[], object] = lambda: None
    ) -> None:
        self._function, self._forget = function, forget
        self._input = torch.empty_like(example)
        self._replays = example.is_cuda
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, values: Tensor) -> None:
        if not self._replays:
            self._function(values.detach())
            return
        self._input.copy_(values.detach())
        if self._warm and self._graph is None:
            self._capture()
        if self._graph is None:
            self._function(self._input)
            self._warm = True
        else:
            self._graph.replay()

    def _capture(self) -> None:
        try:
            self._graph = _captured(lambda: self._function(self._input), _anchor(self._input.device))
        except torch.OutOfMemoryError:  # nothing of what was captured has run
            self._forget()
            self._replays = False


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work inside runs on a stream of its own, after what was queued before it and before what comes after it."""
    if device.type != "cuda":
        yield
        return
    outside, inside = torch.cuda.current_stream(device), _stream(device)
    inside.wait_stream(outside)
    try:
        with torch.cuda.stream(inside):
            yield
    finally:
        outside.wait_stream(inside)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # always the same one: freed memory is kept for the stream it was used on


@functools.cache
def _anchor(device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph that is never replayed and keeps the pool alive which the others allocate from, one after the other."""
    torch.zeros(1, device=device)  # its kernel is loaded before the capture
    return _captured(lambda: torch.zeros(1, device=device))


def _captured(function: Callable[[], object], anchor: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Not by `torch.cuda.graph`, which empties the allocator's cache: too dear for a capture a batch."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=None if anchor is None else anchor.pool())
    try:
        function()
    except BaseException:
        with suppress(RuntimeError):  # of a capture that is worth nothing any more: it would hide why
            graph.capture_end()
        raise
    graph.capture_end()
    return graph
