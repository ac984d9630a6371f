from copy import deepcopy

import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models.adapters import Bottleneck, LowRank, low_rank_layers

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "1x1": (lambda: nn.Conv2d(3, 5, 1), (2, 3, 8, 8)),
    "3x3": (lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False), (2, 3, 8, 8)),
    "strided, dilated": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=(2, 0), dilation=2), (2, 3, 9, 8)),
    "same, reflected": (lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (2, 3, 8, 8)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def moved(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    return module


@every_layer
def test_a_low_rank_branch_starts_as_the_identity(make, shape):
    torch.manual_seed(0)
    layer, inputs = make(), torch.randn(shape)
    before = layer(inputs)
    LowRank(layer, 2, 4.0).beside(layer)
    assert torch.equal(layer(inputs), before)


@every_layer
def test_merged_equals_unmerged(make, shape):
    torch.manual_seed(0)
    layer, inputs = make().double(), torch.randn(shape).double()
    plain = deepcopy(layer)
    branch = moved(LowRank(layer, 2, 4.0).double())
    branch.beside(layer)
    unmerged = layer(inputs)
    assert not torch.allclose(unmerged, plain(inputs), atol=0.1)
    branch.merge(plain)
    torch.testing.assert_close(plain(inputs), unmerged, rtol=1e-6, atol=1e-6)
    branch = moved(branch)
    unmerged = layer(inputs)
    branch.merge(layer)
    torch.testing.assert_close(layer(inputs), unmerged, rtol=1e-6, atol=1e-6)  # the branch adds nothing any more


@every_layer
def test_the_change_is_alpha_over_rank_times_a_product_of_that_rank(make, shape):
    torch.manual_seed(0)
    layer = make()
    before = layer.weight.detach().clone()
    branch = moved(LowRank(layer, 2, 6.0))
    product = branch.up.weight.flatten(1) @ branch.down.weight.flatten(1)
    branch.merge(layer)
    change = (layer.weight - before).flatten(1)
    torch.testing.assert_close(change, 3.0 * product, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_a_copy_of_a_model_hangs_on_its_own_branches():
    layer = nn.Linear(3, 3)
    branch = LowRank(layer, 2, 2.0)
    branch.beside(layer)
    whole = nn.ModuleDict({"layer": layer, "branch": branch})
    copy = deepcopy(whole)
    inputs = torch.randn(2, 3)
    before = copy["layer"](inputs)
    moved(branch)
    assert torch.equal(copy["layer"](inputs), before)
    moved(copy["branch"])
    assert not torch.equal(copy["layer"](inputs), before)


def test_a_bottleneck_starts_as_nothing_and_learns():
    torch.manual_seed(0)
    branch, inputs = Bottleneck(6, 2, 0.1), torch.randn(5, 6)
    assert not branch(inputs).any()
    branch(inputs).sum().backward()
    assert branch.up.weight.grad.any()
    moved(branch)
    torch.testing.assert_close(branch(inputs), 0.1 * branch.up(branch.down(inputs).relu()))


def test_drawing_again_makes_another_draw_that_adds_nothing():
    layer = nn.Linear(4, 4)
    branch = moved(LowRank(layer, 2, 2.0))
    torch.manual_seed(1)
    branch.reset()
    first = branch.down.weight.clone()
    branch.reset()
    assert not torch.equal(first, branch.down.weight)
    assert not branch(torch.randn(3, 4)).any()


def test_only_linear_layers_and_ungrouped_convolutions_are_found():
    backbone = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Linear(4, 4),
        nn.MultiheadAttention(4, 2),  # computes with its output layer's weight, without calling it
    )
    assert list(low_rank_layers(backbone, ["*"])) == ["1", "3"]
    assert list(low_rank_layers(backbone, ["3", "[0-2]"])) == ["1", "3"]


def test_a_pattern_that_matches_no_layer_is_refused_with_names_that_are_near():
    backbone = nn.ModuleDict({"first": nn.Conv2d(1, 1, 1), "classifier": nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match=r"strategy\.layers: expected .* such as classifier, first, got 'clasifier'"):
        low_rank_layers(backbone, ["*", "clasifier"])
