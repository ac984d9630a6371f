"""The networks that `fisher.py` measures, with random images and fresh weights, so nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cl_runner.models import timm as timm_models
from cl_runner.models import torchvision as torchvision_models
from cl_runner.models.architecture import Architecture
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.mlp import MLP
from cl_runner.models.model import Model
from cl_runner.models.resnet import ResNet18
from cl_runner.models.weights import Net
from cl_runner.streams.base import Examples, Scenario, Shape, Stream, Task


@dataclass(frozen=True, kw_only=True)
class Made(Architecture):
    """A network with options that no configuration offers."""

    make: Callable[[], Net]

    def network(self, shape: Shape, published: bool) -> Net:
        return self.make()


def vit_tiny() -> Net:
    import timm

    options: dict[str, Any] = {"img_size": 64, "patch_size": 8}
    return timm_models.take_apart(timm.create_model("vit_tiny_patch16_224", pretrained=False, **options), "head")


def small_torchvision_vit() -> Net:
    """A small net of vit_b_16's class, whose attention is nn.MultiheadAttention."""
    from torchvision.models import VisionTransformer

    net = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    return torchvision_models.take_apart(net, ())


def without_biases() -> Net:
    layers = (nn.Linear(784, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False), nn.ReLU())
    return Net(nn.Sequential(nn.Flatten(), *layers))


@dataclass(frozen=True)
class Subject:
    """A network to measure, with its image and batch sizes."""

    title: str
    architecture: Architecture
    shape: Shape
    batch_size: int = 32

    def build(self, num_classes: int, device: torch.device) -> Model:
        """The model in train mode, with every output revealed."""
        stream = self._stream(num_classes)
        model = self.architecture.build(stream)
        model.reveal(stream.tasks[0])
        return model.to(device).train()

    def examples(self, size: int, num_classes: int, device: torch.device) -> Examples:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (size, *self.shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(num_classes, (size,), generator=generator)
        return Examples(images, labels, torch.zeros(size, dtype=torch.int64)).to(device)

    def _stream(self, num_classes: int) -> Stream:
        def nothing(split: str) -> Examples:
            return self.examples(0, num_classes, torch.device("cpu"))

        task = Task(0, tuple(range(num_classes)), nothing)
        return Stream(Scenario.DOMAIN, [task], num_classes, self.shape, None, None)


def fresh_timm(name: str) -> Architecture:
    return timm_models.Timm(name=name, pretrained=False)


def fresh_torchvision(name: str) -> Architecture:
    return torchvision_models.TorchVision(name=name, pretrained=False)


# Of Tiny ImageNet's size for networks that would shrink 32 pixels to one.
DIGIT, SMALL, LARGE = (1, 28, 28), (3, 32, 32), (3, 64, 64)

SUBJECTS = {
    "mlp": Subject("MLP 784-400-400", MLP(), DIGIT, batch_size=256),
    "resnet18": Subject("ResNet-18 (CIFAR stem)", ResNet18(), SMALL),
    "vit_tiny": Subject("ViT-Ti/8, 64 px", Made(make=vit_tiny), LARGE),
    "mobilenet_v2": Subject("torchvision MobileNetV2", fresh_torchvision("mobilenet_v2"), SMALL),
    "efficientnet_lite0": Subject("EfficientNet-Lite0, 64 px", EfficientNetLite0(pretrained=False), LARGE),
    "resnet18_imagenet": Subject("torchvision ResNet-18", fresh_torchvision("resnet18"), LARGE),
    "vit_torchvision": Subject("torchvision ViT, 2 blocks of 32", Made(make=small_torchvision_vit), SMALL),
    "convnext_atto": Subject("timm ConvNeXt-Atto", fresh_timm("convnext_atto"), LARGE),
    "regnetx_002": Subject("timm RegNetX-200MF", fresh_timm("regnetx_002"), LARGE),
    "partly_frozen": Subject(
        "ResNet-18 (16 channels), partly frozen",
        ResNet18(width=16, freeze=["conv1.*", "layer1.*", "layer2.0.bn1.bias", "layer3.1.conv2.weight"]),
        SMALL,
    ),
    "bias_free": Subject("MLP without biases", Made(make=without_biases), DIGIT),
}
TIMED = ("mlp", "resnet18", "vit_tiny", "mobilenet_v2", "efficientnet_lite0")


def unsettle(model: Model) -> None:
    """Move every parameter vector and running statistic away from its initial zeros and ones.

    Layer scales of 1e-6, zero-initialised norms and centred statistics would hide errors in a layer.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, buffer in model.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator).to(buffer.device)
            if name.endswith("running_mean"):
                buffer += 0.2 * (noise - 0.5)
            elif name.endswith("running_var"):
                buffer *= 0.5 + noise
