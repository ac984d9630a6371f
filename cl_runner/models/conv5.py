"""The five convolutions of van de Ven et al. (2020, https://doi.org/10.1038/s41467-020-17866-2), to be pretrained."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cl_runner.models.architecture import ImageArchitecture
from cl_runner.models.mlp import perceptron
from cl_runner.models.weights import Net
from cl_runner.ranges import Count
from cl_runner.streams.base import Shape

WIDTHS, STRIDES = (16, 32, 64, 128, 256), (1, 2, 2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class Conv5(ImageArchitecture):
    """Five 3x3 convolutions, with batch normalisation and ReLU after all but the last, flattened: 1024 features of a
    32x32 image; then fully connected layers with ReLU, of the given `widths`.

    Names are those of the published weights (https://github.com/GMvandeVen/continual-learning). A file must hold
    exactly the convolutions' weights; of the fully connected layers it must hold all, or none, which are then fresh.
    """

    first_weight = "convLayer1.conv.weight"

    widths: Sequence[Count] = ()

    def network(self, shape: Shape, published: bool) -> Net:
        channels, height, width = shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (out, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), start=1):
            layers[f"convLayer{index}"] = _layer(channels, out, stride, last=index == len(WIDTHS))
            channels, height, width = out, -(-height // stride), -(-width // stride)
        layers["flatten"] = nn.Flatten()
        if self.widths:
            layers["mlp"] = perceptron(channels * height * width, self.widths)
        return Net(nn.Sequential(layers), optional="mlp." if self.widths else None)


def _layer(channels: int, out: int, stride: int, last: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(channels, out, 3, stride, padding=1))
    if not last:
        layers["bn"], layers["relu"] = nn.BatchNorm2d(out), nn.ReLU()
    return nn.Sequential(layers)
