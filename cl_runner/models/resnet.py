"""ResNet-18 as used in continual learning: for small images, and with reduced width."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from cl_runner.models.architecture import ImageArchitecture
from cl_runner.models.weights import Net
from cl_runner.ranges import Count
from cl_runner.streams.base import Shape


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., 2015, https://arxiv.org/abs/1512.03385, figure 5 left)."""

    def __init__(self, channels: int, out: int, stride: int, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, out, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv3x3(out, out), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.last = nn.ReLU() if last_relu else nn.Identity()
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images if self.downsample is None else self.downsample(images)
        return self.last(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images))))) + shortcut)


class ResNet(nn.Module):
    """Images [B, C, H, W] -> features [B, 8 * width]; names as torchvision's."""

    def __init__(self, channels: int, width: int, stem: str, strides: Sequence[int], last_relu: bool) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False) if imagenet else conv3x3(channels, width)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        before = width
        for index, stride in enumerate(strides):
            out = width * 2**index
            first = BasicBlock(before, out, stride)
            second = BasicBlock(out, out, 1, last_relu or index < len(strides) - 1)
            self.add_module(f"layer{index + 1}", nn.Sequential(first, second))
            before = out
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        for module in self.children():
            images = module(images)
        return images


@dataclass(frozen=True, kw_only=True)
class ResNet18(ImageArchitecture):
    """Four stages of two basic blocks, with `width` channels doubling per stage, then the mean over the image.

    width: 64 is ResNet-18, 20 the reduced one of Lopez-Paz & Ranzato (2017, https://arxiv.org/abs/1706.08840). stem:
    `cifar`, one 3x3 convolution, or `imagenet`, 7x7 with stride 2 and max-pooling. strides: of the four stages.
    last_relu: false omits the last non-linearity, so that features may be negative. Fresh weights have PyTorch's
    default initialisation.
    """

    first_weight = "conv1.weight"

    width: Count = 64
    stem: Literal["cifar", "imagenet"] = "cifar"
    strides: Annotated[Sequence[Count], Field(min_length=4, max_length=4)] = (1, 2, 2, 2)
    last_relu: bool = True

    def network(self, shape: Shape, published: bool) -> Net:
        net = ResNet(shape[0], self.width, self.stem, self.strides, self.last_relu)
        return Net(net, classifiers=("fc",))
