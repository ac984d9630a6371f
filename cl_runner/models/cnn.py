"""A small convolutional network."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from cl_runner.models.architecture import ImageArchitecture
from cl_runner.models.weights import Net
from cl_runner.ranges import Count
from cl_runner.streams.base import Shape


@dataclass(frozen=True, kw_only=True)
class CNN(ImageArchitecture):
    """For each width a 3x3 convolution, batch normalisation (if `batch_norm`), ReLU and 2x2 max-pooling; then the mean
    over the remaining pixels, so that features [B, widths[-1]] have the same shape for every image size."""

    first_weight = "conv1.weight"

    widths: Annotated[Sequence[Count], Field(min_length=1)] = (32, 64, 128)
    batch_norm: bool = True

    def network(self, shape: Shape, published: bool) -> Net:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = shape[0]
        for index, width in enumerate(self.widths, start=1):
            layers[f"conv{index}"] = nn.Conv2d(channels, width, 3, padding=1, bias=not self.batch_norm)
            if self.batch_norm:
                layers[f"bn{index}"] = nn.BatchNorm2d(width)
            layers[f"relu{index}"] = nn.ReLU()
            layers[f"pool{index}"] = nn.MaxPool2d(2, ceil_mode=True)  # an image of one pixel stays one
            channels = width
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        return Net(nn.Sequential(layers))
