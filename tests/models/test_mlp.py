import math

import pytest
import torch
from torch import nn

from cl_runner.models import MLP
from tests.models.samples import GRAY, images, stream_of


def layers(model, kind) -> list:
    return [layer for layer in model.backbone if isinstance(layer, kind)]


def test_it_flattens_and_ends_in_the_last_width():
    model = MLP(widths=[12, 5]).build(stream_of(GRAY))
    assert [(layer.in_features, layer.out_features) for layer in layers(model, nn.Linear)] == [(64, 12), (12, 5)]
    assert model(images(GRAY)).features.shape == (4, 5)


def test_it_is_relu_of_linear_layers():
    model = MLP(widths=[12, 5]).build(stream_of(GRAY)).eval()
    first, second = layers(model, nn.Linear)
    flat = (images(GRAY) / 255).flatten(1)
    torch.testing.assert_close(model(images(GRAY)).features, second(first(flat).relu()).relu())


@pytest.mark.parametrize(("activation", "kind"), [("gelu", nn.GELU), ("tanh", nn.Tanh), ("leaky_relu", nn.LeakyReLU)])
def test_the_activation_can_be_chosen(activation, kind):
    assert len(layers(MLP(widths=[4, 4], activation=activation).build(stream_of(GRAY)), kind)) == 2


def test_dropout_follows_each_activation():
    model = MLP(widths=[4, 4], dropout=0.25).build(stream_of(GRAY))
    assert [type(layer) for layer in model.backbone] == [nn.Flatten] + 2 * [nn.Linear, nn.ReLU, nn.Dropout]
    assert {layer.p for layer in layers(model, nn.Dropout)} == {0.25}


def test_xavier_draws_the_hidden_layers_by_glorots_bound_with_zero_bias():
    model = MLP(widths=[100, 100], init="xavier").build(stream_of(GRAY))
    first, second = layers(model, nn.Linear)
    for layer in (first, second):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    assert not torch.equal(first.weight[:, :64], second.weight[:, :64])
    assert model.head.bias.any()


def test_the_torch_draw_is_pytorchs_own():
    (layer,) = layers(MLP(widths=[200], init="torch").build(stream_of(GRAY)), nn.Linear)
    assert 0.99 / 8 < layer.weight.abs().max() <= 1 / 8
    assert layer.bias.any()
