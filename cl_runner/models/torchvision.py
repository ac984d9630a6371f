"""Any of torchvision's classification networks by name, with its published weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import ImageArchitecture, refused
from cl_runner.models.weights import Inputs, Net, nearest
from cl_runner.streams.base import Shape

SIZE_ARGUMENTS = {"vit": "image_size", "maxvit": "input_size"}  # of networks built for a fixed image size
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception": ("AuxLogits",)}  # classifiers beside the classifier


@dataclass(frozen=True, kw_only=True)
class TorchVision(ImageArchitecture):
    """name: of the network (`resnet50`, `vit_b_16`). pretrained: true for torchvision's default weights, the name of
    others (`IMAGENET1K_V1`), or a file. Gray images are repeated to three channels, for fresh networks too."""

    channels = 3

    name: str = "resnet18"
    pretrained: bool | str = True

    @property
    def label(self) -> str:
        return f"{super().label}/{self.name}"

    @property
    def family(self) -> str:
        return self.name.partition("_")[0]

    def check_names(self) -> None:
        from torchvision import models

        names = models.list_models(module=models)
        if self.name not in names:
            near = nearest(self.name, names)
            raise ConfigError("model.name", f"expected a torchvision classifier, such as {near}; got {self.name!r}")
        if self.uses_published and self.pretrained is not True and self.pretrained not in self._weights():
            exist = ", ".join(self._weights())
            raise ConfigError(
                "model.pretrained",
                f"expected one of {exist} (torchvision's weights for {self.name}), true, false or a file, "
                f"got {self.pretrained!r}",
            )
        size = self.published_inputs().size
        if self.uses_published and self.family in SIZE_ARGUMENTS and self.image_size and (self.image_size,) * 2 != size:
            raise ConfigError(
                "model.image_size", f"expected {size} or null for {self.name}'s weights, got {self.image_size}"
            )

    def published_inputs(self) -> Inputs:
        transforms = self._chosen().transforms()
        if self.family in AUXILIARY:  # what `transform_input` turns ImageNet's mean and std into
            return Inputs(3, tuple(transforms.crop_size * 2), (0.5,) * 3, (0.5,) * 3)
        return Inputs(3, tuple(transforms.crop_size * 2), tuple(transforms.mean), tuple(transforms.std))

    def network(self, shape: Shape, published: bool) -> Net:
        from torchvision import models

        options: dict[str, Any] = {"weights": self._chosen()} if published else {}
        if self.family in AUXILIARY and not published:
            options = {"init_weights": True, "aux_logits": False}
        elif self.family in SIZE_ARGUMENTS and not published:
            options = {SIZE_ARGUMENTS[self.family]: shape[1] if self.family == "vit" else shape[1:]}
        try:
            net = models.get_model(self.name, **options)
        except OSError as error:
            message = f"expected weights that torchvision can fetch, got {self._chosen()!r} ({error})"
            raise ConfigError("model.pretrained", message) from error
        except ValueError as error:
            raise refused(self.label, shape, error) from error
        return take_apart(net, AUXILIARY.get(self.family, ()))

    def _weights(self) -> Mapping[str, Any]:
        """By name, without those that are not for classification."""
        from torchvision import models

        members = models.get_model_weights(self.name).__members__
        return {name: entry for name, entry in members.items() if entry.meta["categories"] and name != "DEFAULT"}

    def _chosen(self) -> Any:
        from torchvision import models

        asked = self.pretrained if self.uses_published and isinstance(self.pretrained, str) else "DEFAULT"
        return models.get_model_weights(self.name)[asked]


def take_apart(net: Any, auxiliary: tuple[str, ...]) -> Net:
    """Cut `net` before its last linear layer, and drop auxiliary classifiers."""
    for name in auxiliary:
        setattr(net, name, None)
    if auxiliary:
        net.aux_logits, net.transform_input = False, False
    linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:  # SqueezeNet ends in convolution, ReLU, mean: average what precedes them
        net.classifier = nn.AdaptiveAvgPool2d(1)
        return Net(net, None, ("classifier.1",))
    name, head = linear[-1]
    net.set_submodule(name, nn.Identity())
    return Net(net, head, (name, *auxiliary))
