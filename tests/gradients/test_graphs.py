"""Replaying without a device to replay on; see `test_gpu.py` for one."""

from contextlib import suppress
from functools import cache, partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from cl_runner.fisher import reference
from cl_runner.fisher.estimators import Exact
from cl_runner.gradients import graphs, layers, passes
from cl_runner.gradients.graphs import Replayed, side_stream
from cl_runner.streams.base import Scenario
from tests.fisher.cases import FEATURES, PIXELS, distance, examples, model


def test_off_the_device_every_call_has_the_functions_effect_once() -> None:
    total = torch.zeros(2)
    with side_stream(total.device):
        add = Replayed(total.add_, torch.zeros(2))
        for values in torch.arange(8.0).view(4, 2):
            add(values)
    torch.testing.assert_close(total, torch.tensor([12.0, 16.0]))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Let captures fail: (function) -> what happens to it before memory runs out."""

    class Replayed(graphs.Replayed):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self._replays = True

    def capture(happens):
        def captured(function, anchor=None):
            happens(function)
            raise torch.OutOfMemoryError

        monkeypatch.setattr(graphs, "_captured", captured)
        monkeypatch.setattr(graphs, "_anchor", cache(lambda device: None))
        monkeypatch.setattr(passes, "Replayed", Replayed)
        return Replayed

    return capture


def test_without_memory_for_a_graph_every_call_has_the_functions_effect_once(as_on_a_device) -> None:
    captures = []
    total = torch.zeros(2)
    add = as_on_a_device(captures.append)(total.add_, torch.zeros(2))
    for values in torch.arange(8.0).view(4, 2):
        add(values)
    torch.testing.assert_close(total, torch.tensor([12.0, 16.0]))
    assert len(captures) == 1


def test_a_capture_that_ran_out_of_memory_leaves_nothing_in_a_fisher(as_on_a_device, monkeypatch) -> None:
    captures = []

    def until_its_passes_are_added(block) -> None:
        captures.append(block)
        with monkeypatch.context() as during:
            during.setattr(layers.Weighted, "flush", Mock(side_effect=torch.OutOfMemoryError))
            with suppress(torch.OutOfMemoryError):
                block()

    subject = model(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES, bias=False)), Scenario.DOMAIN)
    subject.head.bias.requires_grad_(False)
    expected = reference.exact(subject, examples())
    as_on_a_device(until_its_passes_are_added)
    monkeypatch.setattr(passes, "TOGETHER", 1)
    monkeypatch.setattr(layers, "gram_is_cheaper", lambda *_: False)
    monkeypatch.setattr(layers.kernels, "available", lambda _: True)  # so that gradients wait for the end of a block
    monkeypatch.setattr(layers.kernels, "add_linear_squares", lambda total, *others: others[-1](total))
    assert distance(Exact()(subject, examples()), expected) < 1e-10
    assert captures


class Graph:
    """A CUDA graph whose capture has become invalid, as after a wait for the device."""

    def capture_begin(self, pool) -> None:
        self.begun = pool

    def capture_end(self) -> None:
        raise RuntimeError("the capture is invalid")


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("says", ["the function waits", None], ids=["raising", "silent"])
def test_a_capture_that_cannot_end_gives_its_pool_back_and_names_the_cause(says, heard, monkeypatch) -> None:
    told = []

    def tell(name, *about) -> None:
        told.append((name, *about))
        if heard and name == "_cuda_endAllocateToPool":
            raise RuntimeError("not recording to this pool")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, partial(tell, name), raising=False)

    def function() -> None:
        if says:
            raise RuntimeError(says)

    with pytest.raises(RuntimeError, match=says or "the capture is invalid"):
        graphs._captured(function)
    assert told == [("_cuda_endAllocateToPool", 1, (0, 7)), ("_cuda_releasePool", 1, (0, 7))]


def test_two_blocks_of_passes_are_not_worth_a_capture(as_on_a_device, monkeypatch) -> None:
    captures = []
    as_on_a_device(captures.append)
    subject = model(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES)), Scenario.DOMAIN)  # five passes
    for together, captured in ((2, 0), (1, 1)):
        monkeypatch.setattr(passes, "TOGETHER", together)
        Exact(batch_size=64)(subject, examples())
        assert len(captures) == captured
