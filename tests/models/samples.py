"""Streams without data, and files of weights, to build models from."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_runner.models import CNN, MLP, Conv5, EfficientNetLite0, ResNet18, Timm, TorchVision
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples, Scenario, Stream, Task

RGB, GRAY = (3, 32, 32), (1, 8, 8)


def nothing(_: str) -> Examples:
    return Examples(torch.empty(0), torch.empty(0), torch.empty(0))


def stream_of(shape=RGB, scenario="class", mean=None, std=None, augment=(), classes=((0, 1), (2, 3), (4, 5))) -> Stream:
    tasks = [Task(index, chosen, nothing) for index, chosen in enumerate(classes)]
    size = 1 + max(max(chosen) for chosen in classes)
    return Stream(Scenario(scenario), tasks, size, shape, mean, std, augment, crop_padding=2)


def images(shape=RGB, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)


def saved(model: Model, path: Path) -> str:
    """Write a file of weights as a finished run does."""
    save_file(model.plain_state(), path, model.metadata)
    return str(path)


SMALL = {
    "mlp": partial(MLP, widths=[16, 8]),
    "cnn": partial(CNN, widths=[4, 8]),
    "conv5": Conv5,
    "conv5 and layers": partial(Conv5, widths=[16]),
    "resnet18": partial(ResNet18, width=4),
    "resnet18 reduced": partial(ResNet18, width=4, last_relu=False),
    "resnet18 imagenet": partial(ResNet18, width=4, stem="imagenet"),
    "efficientnet_lite0": EfficientNetLite0,
    "torchvision": partial(TorchVision, name="shufflenet_v2_x0_5"),
    "torchvision squeezenet": partial(TorchVision, name="squeezenet1_1"),
    "timm": partial(Timm, name="test_resnet"),
    "timm vit": partial(Timm, name="test_vit"),
    "timm distilled": partial(Timm, name="deit_tiny_distilled_patch16_224"),
}
every_architecture = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
