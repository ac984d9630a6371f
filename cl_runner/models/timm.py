"""Any network of timm (https://github.com/huggingface/pytorch-image-models) by name."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models.architecture import ImageArchitecture, refused
from cl_runner.models.weights import Inputs, Net, nearest
from cl_runner.streams.base import Shape


@dataclass(frozen=True, kw_only=True)
class Timm(ImageArchitecture):
    """name: of the network, with or without the tag of its weights (`resnet50`, `resnet50.a1_in1k`). pretrained: true
    for the name's tag or timm's default, or a tag, or a file. Networks for a fixed image size are built for
    `image_size`; timm adapts published weights to it, but those of a file must have been trained at that size."""

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool | str = True
    channels_last: bool = False

    @property
    def label(self) -> str:
        return f"{super().label}/{self.name}"

    @property
    def full_name(self) -> str:
        """With the tag of the weights, if one is given."""
        name = self.name.partition(".")[0]
        return f"{name}.{self.pretrained}" if self.uses_published and isinstance(self.pretrained, str) else self.name

    def check_names(self) -> None:
        import timm

        name, _, tag = self.full_name.partition(".")
        if not timm.is_model(name):
            near = nearest(name, timm.list_models())
            raise ConfigError("model.name", f"expected the name of a timm network, such as {near}; got {self.name!r}")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
        if self.uses_published and not tags:
            near = nearest(name, {known.partition(".")[0] for known in timm.list_pretrained()})
            exist = f"expected false or a file (timm has no weights for {name}, but for {near})"
            raise ConfigError("model.pretrained", f"{exist}, got {self.pretrained!r}")
        if tag and tag not in tags:
            exist = f"expected one of {', '.join(tags) or 'no tag'} (timm's weights for {name})"
            if self.uses_published and self.pretrained is not True:
                raise ConfigError("model.pretrained", f"{exist}, true, false or a file, got {self.pretrained!r}")
            raise ConfigError("model.name", f"{exist} after the dot, got {self.name!r}")

    def published_inputs(self) -> Inputs:
        return recorded(self.full_name)

    def network(self, shape: Shape, published: bool) -> Net:
        return create(self.full_name, shape, published)


def recorded(name: str) -> Inputs:
    """The images that the weights of that name expect, as timm records them."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or config.input_size is None:
        return Inputs()
    channels, height, width = config.input_size
    return Inputs(channels, (height, width), tuple(config.mean), tuple(config.std))


def create(name: str, shape: Shape, pretrained: bool) -> Net:
    """timm's network for images of `shape`, split into backbone and classifier.

    Raises ConfigError if it cannot be built for them, or its weights cannot be fetched.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, *size = shape
    options: dict[str, Any] = {"in_chans": channels} if config is None or channels != recorded(name).channels else {}
    if config is not None and config.fixed_input_size and tuple(size) != recorded(name).size:
        options["img_size"] = tuple(size)
    try:
        net = timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:
        said = " ".join(str(error).split())
        expected = f"expected weights of {name} that timm can fetch, or false or a file where it cannot"
        raise ConfigError("model.pretrained", f"{expected} ({said})") from error
    except (TypeError, ValueError, AssertionError) as error:
        raise refused(f"timm/{name}", shape, error) from error
    return take_apart(net, config.classifier if config is not None else None)


def take_apart(net: Any, classifiers: str | tuple[str, ...] | None) -> Net:
    """Cut `net` before its classifier, or its several ones, whose names timm records."""
    head = net.get_classifier()
    if isinstance(classifiers, str) and isinstance(head, nn.Linear):
        net.set_submodule(classifiers, nn.Identity())
        return Net(net, head, (classifiers,))
    net.reset_classifier(0)
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers or ("head",))
    return Net(net, None, names)
