import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.fisher.magnitudes import Magnitudes, add_tapped
from cl_runner.gradients.fallbacks import add_looped, add_vmapped
from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from tests.toys import SHAPE, toy_model, toy_stream


def slow(model, examples, outputs=None):
    """One sample at a time, by plain autograd; `outputs`: the active logits of each task."""
    model.eval()
    live = {name: value for name, value in model.named_parameters() if value.requires_grad}
    totals = {name: torch.zeros_like(value) for name, value in live.items()}
    for row in range(len(examples)):
        one = examples[row : row + 1]
        logits = model(one.images).logits[0]
        chosen = logits if outputs is None else logits[outputs[int(one.task_ids)]]
        gradients = torch.autograd.grad(chosen.square().sum(), list(live.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.abs() / len(examples)
    return totals


class Shared(nn.Module):
    """A convolution, a normalisation, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Linear(16, 16, bias=False)

    def forward(self, images):
        hidden = self.norm(self.first(images)).relu().mean(1).flatten(1)
        return self.twice(self.twice(hidden).tanh())


def networks():
    stream = toy_stream("class")
    shared = Model(Preprocess(1), Shared(), 16, stream)
    return {"mlp": toy_model(stream), "shared": shared}


@pytest.mark.parametrize("name", ["mlp", "shared"])
@pytest.mark.parametrize("logits", ["visible", "all"])
def test_they_are_the_mean_over_samples_of_each_samples_own(name, logits):
    torch.manual_seed(0)
    stream, model = toy_stream("class"), networks()[name]
    model.reveal(stream.tasks[0])
    model.reveal(stream.tasks[1])
    examples = stream.tasks[1].train
    expected = slow(model, examples, {1: [0, 1, 2, 3]} if logits == "visible" else None)
    found = Magnitudes(batch_size=7, logits=logits)(model, examples)
    assert found.values.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found.values[key], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [add_tapped, add_vmapped, add_looped])
def test_every_way_gives_the_same(way):
    torch.manual_seed(0)
    model = networks()["shared"].eval()
    inputs = torch.randn(5, *SHAPE)
    totals = {name: torch.zeros_like(value, requires_grad=False) for name, value in model.named_parameters()}
    way(model, totals, inputs, lambda logits: 2 * logits[:, None], measure=torch.abs)
    expected = {name: torch.zeros_like(value) for name, value in totals.items()}
    for one in inputs.split(1):
        gradients = torch.autograd.grad(model.encode(one).logits.square().sum(), list(model.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.abs()
    for name, values in expected.items():
        torch.testing.assert_close(totals[name], values, rtol=1e-4, atol=1e-6)


def test_they_do_not_depend_on_the_batch_size():
    stream = toy_stream()
    model = toy_model(stream)
    model.reveal(stream.tasks[0])
    one, other = (Magnitudes(batch_size=size)(model, stream.tasks[0].train).values for size in (1, 64))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_a_frozen_part_is_left_out():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone.requires_grad_(False)
    model.reveal(stream.tasks[0])
    assert list(Magnitudes()(model, stream.tasks[0].train).values) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("setting", [{"representation": "full"}, {"precision": "bf16"}])
def test_what_it_cannot_hold_is_refused(setting):
    with pytest.raises(ConfigError, match="for magnitudes"):
        Magnitudes(**setting)
