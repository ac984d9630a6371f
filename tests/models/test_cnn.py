import pytest
from torch import nn

from cl_runner.models import CNN
from tests.models.samples import images, stream_of


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 5, 7)])
def test_features_are_the_last_width_whatever_the_images_size(shape):
    assert CNN(widths=[4, 8, 6, 10]).build(stream_of(shape))(images(shape)).features.shape == (4, 10)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_normalisation_stands_after_each_convolution_and_takes_the_place_of_its_bias(batch_norm):
    backbone = CNN(widths=[4, 8], batch_norm=batch_norm).build(stream_of()).backbone
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d] if batch_norm else [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(layer) for layer in backbone][: 2 * len(kinds)] == 2 * kinds
    assert (backbone.conv1.bias is None) is batch_norm
