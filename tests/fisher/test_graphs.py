"""Replaying without a device to replay on; see `test_gpu.py` for one."""

from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from cl_runner.fisher import graphs, layers, passes, reference
from cl_runner.fisher.estimators import Exact
from cl_runner.fisher.graphs import Replayed, side_stream
from cl_runner.streams.base import Scenario

from .cases import FEATURES, PIXELS, distance, examples, model


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
        monkeypatch.setattr(graphs, "_anchor", lambda device: None)
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
