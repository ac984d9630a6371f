"""Small trainable branches beside the layers of a backbone.

They hang on forward hooks and lie beside the backbone, not in it: its weights keep their names, and files of weights
hold it as it was.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.models.weights import nearest

Layer = nn.Linear | nn.Conv2d


class Branch(nn.Module):
    """Adds its own output to a layer's."""

    def beside(self, layer: nn.Module) -> None:
        """From now on `layer` says layer(x) + branch(x)."""
        layer.register_forward_hook(self._added)  # a bound method: a copy of the model hangs on the branch's copy

    def _added(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self(inputs[0])


class LowRank(Branch):
    """x -> alpha / rank * B A x (LoRA: Hu et al., 2022, arXiv 2106.09685, eq. 3), shaped as a layer's own product.

    A convolution's A is a convolution to `rank` channels, its B one of 1 x 1 pixels.
    """

    def __init__(self, layer: Layer, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down: Layer
        self.up: Layer
        if isinstance(layer, nn.Conv2d):
            names = "kernel_size", "stride", "padding", "dilation", "padding_mode"
            window: dict[str, Any] = {name: getattr(layer, name) for name in names}
            self.down = nn.Conv2d(layer.in_channels, rank, bias=False, **window)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """A normal with variance 1 / fan-in, B zero: the branch adds nothing yet."""
        # Drawn on the CPU: the same on every device.
        self.down.weight.copy_(torch.randn(self.down.weight.shape) * self.down.weight[0].numel() ** -0.5)
        self.up.weight.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.up(self.down(inputs))

    @torch.no_grad()
    def merge(self, layer: Layer) -> None:
        """Put what the branch adds into the layer's weight, and nothing more into the branch."""
        layer.weight += self.scale * (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view_as(layer.weight)
        self.up.weight.zero_()


class Bottleneck(Branch):
    """x -> scale * up(relu(down(x))) (AdaptFormer: Chen et al., 2022, arXiv 2205.13535, eq. 3)."""

    def __init__(self, features: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """`down` normal with variance 1 / fan-in, the rest zero: the branch adds nothing yet."""
        for parameter in self.parameters():
            parameter.zero_()
        self.down.weight.copy_(torch.randn(self.down.weight.shape) * self.down.in_features**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.up(self.down(inputs).relu())


@torch.no_grad()
def called_in(model: nn.Module, images: Tensor, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Those of the layers that a pass calls as modules: of the others it reads the weight, past any branch."""
    seen: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: seen.add(layer)) for layer in layers.values()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if layer in seen}


def low_rank_layers(backbone: nn.Module, patterns: Sequence[str]) -> dict[str, Layer]:
    """By name, the layers that a pattern matches and a low-rank branch can stand beside.

    Those are linear layers and convolutions without groups; not their subclasses, which compute something else.

    Raises ConfigError for a pattern that matches none, with names that are near.
    """
    known: dict[str, Layer] = {
        name: module
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    }
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in known if fnmatchcase(name, pattern)}
        if not matched:
            near = nearest(pattern, known)
            expected = f"expected patterns of the backbone's linear and convolutional layers, such as {near}"
            raise ConfigError("strategy.layers", f"{expected}, got {pattern!r}")
        found |= matched
    return {name: layer for name, layer in known.items() if name in found}
