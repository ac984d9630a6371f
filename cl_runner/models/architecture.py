"""Base classes of architectures: a backbone's initial weights, its frozen parts, and the images it takes."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.identity import choice, weights_file
from cl_runner.models import weights
from cl_runner.models.heads import Init
from cl_runner.models.model import ActiveLogits, Model
from cl_runner.models.preprocess import Interpolation, Preprocess
from cl_runner.models.weights import Inputs, Net
from cl_runner.randomness import derive_seed
from cl_runner.ranges import Count, Seed
from cl_runner.streams.base import Shape, Stream

Means = tuple[float, ...] | None  # per channel

log = logging.getLogger("cl_runner")


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A recipe for a model: cheap to create and to check, and built once the stream is known.

    pretrained: false, true (the usual published weights), the name of published weights, or a file (safetensors, or
    PyTorch holding tensors only). key_map: regular expressions and replacements for the file's keys, in order; a key
    that becomes empty is dropped. freeze: patterns (`blocks.[0-2].*`, `*`) for the names of the backbone's parameters
    and buffers: they keep their values, and so do the statistics of normalisation layers in frozen parts. norm_stats:
    whether other normalisation layers' running statistics stay `frozen` or `adapt`; null: frozen for pretrained nets,
    adapt for fresh ones. image_size: side in pixels to resize images to; null: the weights' own, or for fresh nets the
    stream's. interpolation: for resizing. normalize: false leaves images in [0, 1], whatever mean and standard
    deviation the weights or the stream have. head_init: how the new head's rows are initialised. seed: of the head and
    of a fresh backbone, which draw independently.
    """

    channels: ClassVar[int | None] = None  # taken by nets without pretrained weights; None: the stream's
    first_weight: ClassVar[str | None] = None  # name of a weight [_, channels, ...]

    pretrained: bool | str = False
    key_map: dict[str, str] | None = None
    freeze: Sequence[str] = ()
    norm_stats: Literal["frozen", "adapt"] | None = None
    image_size: Count | None = None
    interpolation: Interpolation = "bilinear"
    normalize: bool = True
    head_init: Init = "torch"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.pretrained == "":
            raise ConfigError("model.pretrained", "expected true, false, a name or a file, got ''")
        if self.key_map and self.file is None:
            raise ConfigError("model.key_map", f"expected null without a file to rename, got {self.key_map}")
        for pattern, replacement in (self.key_map or {}).items():
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                got = f"{pattern!r}: {replacement!r} ({error})"
                raise ConfigError(
                    "model.key_map", f"expected regular expressions and replacements, got {got}"
                ) from None

    @abstractmethod
    def network(self, shape: Shape, published: bool) -> Net:
        """The network for images of `shape`: fresh, or with the `published` weights that `pretrained` names."""

    def published_inputs(self) -> Inputs:
        """The images that the published weights expect (those `pretrained` names, or else the usual ones)."""
        return Inputs()

    def check_names(self) -> None:
        """Refuse names of networks and of published weights that do not exist.

        Raises ConfigError that lists those that do.
        """
        if self.uses_published:
            raise ConfigError(
                "model.pretrained",
                f"expected false or a file of weights (none are published for {self.label}), got {self.pretrained!r}",
            )

    @property
    def label(self) -> str:
        """The architecture's name in errors and in files of weights."""
        return choice(type(self).__name__)

    def in_channels_last(self, backbone: nn.Module) -> bool:
        return False

    def check(self) -> None:
        """Refuse what `build` would, before any data or weights are loaded.

        Raises ConfigError.
        """
        self.check_names()
        if self.freeze or self.file:
            frozen_names(self.outline.backbone, self.freeze)
        if self.file:
            weights.compare(self.outline, weights.read(self.file, self.key_map, "meta"), shapes=False)

    def check_images(self, shape: Shape) -> None:
        """Refuse images [C, H, W] that do not fit the network or its file of weights.

        Raises ConfigError. If a network cannot be tried on the meta device, only `build` finds out.
        """
        file = weights.read(self.file, self.key_map, "meta") if self.file else None
        inputs = self._resolved(self._own_inputs(file), shape)
        try:
            with torch.device("meta"):
                net = self.network(inputs.shape, published=False)
        except RuntimeError:  # its constructor computes with its weights
            return
        if file:
            weights.compare(net, file, shapes=True)
        with torch.device("meta"), suppress(NotImplementedError):
            self._num_features(net, inputs)

    @property
    def has_pretrained_head(self) -> bool:
        """Whether the pretrained weights include a classifier, which makes the pretrained model task zero."""
        if self.file:
            return self.outline.head_of(weights.read(self.file, self.key_map, "meta").state) is not None
        return self.uses_published and self.outline.head is not None

    def build(self, stream: Stream, active_logits: ActiveLogits | None = None) -> Model:
        """The model for `stream`, on the CPU, determined by the seed; the global generator is left as it was.

        Raises ConfigError if weights, images and network do not fit together.
        """
        with seeded(derive_seed(self.seed, "backbone")):  # else the head's rows would repeat the first layer's
            inputs, net = self._assembled(stream)
            num_features = self._num_features(net, inputs)
            frozen = frozen_names(net.backbone, self.freeze)
            for name, parameter in net.backbone.named_parameters():
                parameter.requires_grad_(name not in frozen)
            channels_last = self.in_channels_last(net.backbone)
            if channels_last:
                net.backbone.to(memory_format=torch.channels_last)
            model = Model(
                self._preprocess(inputs, stream, channels_last),
                net.backbone,
                num_features,
                stream,
                active_logits=active_logits,
                head_init=self.head_init,
                pretrained_head=net.head,
                seed=self.seed,
                head_name=net.classifiers[0],
                metadata={"format": "pt", "architecture": self.label, **inputs.metadata()},
            )
            norm_stats = self.norm_stats or ("frozen" if self.pretrained else "adapt")
            model.keep_in_eval(norm_layers(net.backbone, None if norm_stats == "frozen" else frozen))
        return model

    @cached_property
    def file(self) -> Path | None:
        return weights_file(self.pretrained)

    @property
    def uses_published(self) -> bool:
        """Whether `pretrained` asks for published weights, rather than none or a file's."""
        return bool(self.pretrained) and self.file is None

    @cached_property
    def outline(self) -> Net:
        """The network's names and shapes; on the meta device, which costs next to nothing."""
        usual = self.published_inputs()
        height, width = usual.size or (32, 32)
        shape = usual.channels or self.channels or 3, height, width
        with seeded(self.seed):
            try:
                with torch.device("meta"):
                    return self.network(shape, published=False)
            except RuntimeError:  # some nets' constructors compute with their weights
                return self.network(shape, published=False)

    def _assembled(self, stream: Stream) -> tuple[Inputs, Net]:
        """The images that the network gets, and the network with its weights."""
        file = weights.read(self.file, self.key_map) if self.file else None
        inputs = self._resolved(self._own_inputs(file), stream.image_shape, stream.mean, stream.std)
        if file:
            return inputs, weights.load(self.network(inputs.shape, published=False), file)
        net = self.network(inputs.shape, published=self.uses_published)
        if self.uses_published and net.head is None:
            log.info("%s does not end in one linear layer: its pretrained model cannot be task zero", self.label)
        return inputs, net if self.uses_published else replace(net, head=None)

    def _own_inputs(self, file: weights.WeightsFile | None) -> Inputs:
        """The images that the weights themselves call for."""
        if file:
            return file.inputs or self._usual_inputs(file.state)
        return self.published_inputs() if self.uses_published else Inputs()

    def _usual_inputs(self, state: dict[str, Tensor]) -> Inputs:
        """The images that a file without this information expects."""
        first = state.get(self.first_weight) if self.first_weight else None
        return self.published_inputs() if first is None else Inputs(channels=first.shape[1])

    def _resolved(self, own: Inputs, shape: Shape, mean: Means = None, std: Means = None) -> Inputs:
        """`own`, completed by `image_size` and what the stream's images are: their shape, mean and deviation."""
        came, height, width = shape
        channels = own.channels or self.channels or came
        if came not in (1, channels):
            raise ConfigError(
                "model.pretrained", f"expected weights for {came}-channel images, got {channels}-channel ones"
            )
        size = (self.image_size, self.image_size) if self.image_size else own.size or (height, width)
        if own.mean is not None:
            mean, std = own.mean, own.std
        if not self.normalize:
            mean, std = None, None
        return Inputs(channels, size, mean or (0.0,), std or (1.0,))

    def _preprocess(self, inputs: Inputs, stream: Stream, channels_last: bool) -> Preprocess:
        channels, *_ = inputs.shape
        return Preprocess(
            channels,
            size=inputs.size,
            mean=inputs.mean,
            std=inputs.std,
            augment=stream.augment,
            crop_padding=stream.crop_padding,
            channels_last=channels_last,
            interpolation=self.interpolation,
        )

    def _num_features(self, net: Net, inputs: Inputs) -> int:
        """D of the backbone's features [B, D], by a trial pass, which fails for images that it cannot take."""
        try:
            with torch.no_grad():
                features = net.backbone.eval()(torch.zeros(1, *inputs.shape))
        except NotImplementedError:  # by a layer that the meta device does not support
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            raise refused(self.label, inputs.shape, error) from error
        finally:
            net.backbone.train()
        if features.dim() != 2 or (net.head is not None and net.head.in_features != features.shape[1]):
            wanted = "any" if net.head is None else net.head.in_features
            raise ConfigError("model", f"expected features [B, {wanted}] of {self.label}, got {list(features.shape)}")
        return features.shape[1]


@dataclass(frozen=True, kw_only=True)
class ImageArchitecture(Architecture):
    """An architecture that can compute in NHWC order.

    channels_last: images and weights in NHWC order, which makes a convolutional net's training step 4 to 36 % faster on
    a CPU (EfficientNet-Lite0, ResNet-18, CNN). Very narrow nets (see `has_narrow_shortcut`) stay in NCHW order.
    """

    channels_last: bool = True

    def in_channels_last(self, backbone: nn.Module) -> bool:
        return self.channels_last and not has_narrow_shortcut(backbone)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generator inside, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        yield


def refused(label: str, shape: Shape, error: Exception) -> ConfigError:
    """The ConfigError for a network's own complaint about its images."""
    images, reason = "x".join(map(str, shape)), str(error).partition("\n")[0]
    return ConfigError("model.image_size", f"expected a size that {label} can take, got images of {images} ({reason})")


def frozen_names(backbone: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters and buffers that some pattern matches.

    Raises ConfigError for a pattern that matches none, with similar names.
    """
    names = [name for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())]
    return weights.matching(names, patterns, "model.freeze", "the backbone's names")


def has_narrow_shortcut(backbone: nn.Module) -> bool:
    """Whether some 1x1 convolution with a stride takes fewer than 16 channels.

    In NHWC order on CPUs, the gradient of its weights is wrong or memory is corrupted: oneDNN's workspace is too small
    for fewer channels than a block has, 8 (AVX2) or 16 (AVX-512) (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    return any(max(one.kernel_size) == 1 < max(one.stride) and one.in_channels < 16 for one in layers)


def norm_layers(backbone: nn.Module, frozen: set[str] | None) -> list[nn.Module]:
    """Layers with running statistics: all, or those whose statistics or parameters (all of them) are in `frozen`."""
    found = []
    for name, module in backbone.named_modules():
        if not isinstance(getattr(module, "running_mean", None), Tensor):
            continue
        parameters = {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        statistics = {f"{name}.running_mean", f"{name}.running_var"}
        if frozen is None or statistics & frozen or (parameters and parameters <= frozen):
            found.append(module)
    return found
