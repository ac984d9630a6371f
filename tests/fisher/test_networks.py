"""Popular networks on small images are covered by taps and right in float32."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

from cl_runner.fisher import reference
from cl_runner.fisher.engine import undisturbed
from cl_runner.fisher.estimators import Empirical
from cl_runner.gradients.trial import disagreement
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from cl_runner.models.resnet import ResNet18
from cl_runner.streams.base import Examples, Scenario

from .cases import distance, stream

SIDE, FEATURES = 32, 10
Backbone = Callable[[], nn.Module]


def headed(network: nn.Module) -> nn.Module:
    """Give a torchvision transformer a random head: its own is zero and lets no gradient through."""
    nn.init.normal_(network.heads.head.weight)
    return network


NETWORKS: dict[str, Backbone] = {
    "ResNet18": lambda: ResNet18(pretrained=False, width=8).network((3, SIDE, SIDE), False).backbone,
    "EfficientNetLite0": lambda: EfficientNetLite0(pretrained=False).network((3, SIDE, SIDE), False).backbone,
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=FEATURES),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=FEATURES),
    "torchvision VisionTransformer": lambda: headed(
        torchvision.models.VisionTransformer(SIDE, 8, 2, 2, 24, 48, num_classes=FEATURES)
    ),
    "timm vit_tiny": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=2, num_classes=FEATURES
    ),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1), num_classes=FEATURES),
    "timm regnety_002": lambda: timm.create_model("regnety_002", num_classes=FEATURES),
}


def subject(backbone: Backbone) -> Model:
    torch.manual_seed(0)
    layers = backbone()
    for module in layers.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    preprocess = Preprocess(3, mean=[0.5] * 3, std=[0.25] * 3, augment=())
    with torch.no_grad():
        features = layers.eval()(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
    built = Model(preprocess, layers, features, stream(Scenario.TASK))
    for task in stream(Scenario.TASK).tasks:
        built.reveal(task)
    return built


def images(count: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 3, 1])[:count]
    return Examples(pixels, labels, (labels > 1).long())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_covered_by_taps_and_right_in_float32(name: str) -> None:
    model, data = subject(NETWORKS[name]), images(3)
    with undisturbed(model):
        assert disagreement(model, model.preprocess(data.images[:2])) is None
    found, expected = Empirical()(model, data), reference.empirical(model, data)
    assert distance(found, expected) < 1e-5
    for parameter, values in expected.values.items():
        error = float((found.values[parameter] - values).norm())
        assert error <= 1e-4 * float(values.norm()), parameter
    assert all((values >= 0).all() for values in found.values.values())
