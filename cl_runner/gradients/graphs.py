"""Repeated work, captured once and then replayed as a CUDA graph."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("cl_runner")


class Replayed:
    """A function called for its side effects: run as it is the first time, captured the second, replayed afterwards.

    Each call has the function's effect exactly once. The first call does what is not allowed during a capture:
    compiling and timing kernels, loading libraries. Call it within `side_stream`, where the leaves must have been made
    and the forward pass have run too, since autograd runs a backward pass on the stream of its forward. What the
    function reads and adds to must stay at the same address for as long as this object is called. Off CUDA, and where
    the function cannot be captured (for want of memory, or since it waits for the device), calls go straight through.

    Args:
        function: takes one tensor, which it must not change.
        example: has the shape, dtype and device of all later tensors.
        forget: releases what a call of the function that ended early has left behind in Python.
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
        except RuntimeError as error:  # nothing captured has run
            log.debug("not replayed: %s", error)
            self._forget()
            self._replays = False


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the work inside on a stream of its own, after everything queued before it and before what comes later."""
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
    return torch.cuda.Stream(device)  # always the same: freed memory stays reserved for the stream it was used on


@functools.cache
def _anchor(device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph that is never replayed but keeps alive the pool that the others allocate from in turn."""
    torch.zeros(1, device=device)  # loads its kernel before the capture
    return _captured(lambda: torch.zeros(1, device=device))


def release_pool() -> None:
    """Let go of the memory that graphs were captured in, for others to use."""
    _anchor.cache_clear()


def _captured(function: Callable[[], object], anchor: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Capture without `torch.cuda.graph`, which empties the allocator's cache: too costly for a capture per batch.

    Raises what the function raises, and RuntimeError if it did what cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if anchor is None else anchor.pool()
    graph.capture_begin(pool=pool)
    try:
        function()
    except BaseException:
        with suppress(RuntimeError):  # it would hide the cause
            _end_capture(graph, pool)
        raise
    _end_capture(graph, pool)
    return graph


def _end_capture(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except RuntimeError:  # raised before the allocator lets go of the pool, or even hears of the end
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # it has heard
            torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        raise
