"""Small trainable branches beside the layers of a backbone.

They are attached by forward hooks, not registered in the backbone: its weights keep their names, and files of weights
hold it without them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_runner.models.weights import matching

Layer = nn.Linear | nn.Conv2d


class Branch(nn.Module):
    """A module that adds its output to a layer's."""

    def beside(self, layer: nn.Module) -> None:
        """From now on, `layer` returns layer(x) + branch(x)."""
        layer.register_forward_hook(self._added)  # a bound method, so a copied model uses the copied branch

    def _added(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self(inputs[0])


class LowRank(Branch):
    """x -> alpha / rank * B A x (LoRA: Hu et al., 2022, arXiv 2106.09685, eq. 3), in the shape of a layer's output.

    For a convolution, A is a convolution to `rank` channels, and B a 1 x 1 convolution.
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
        """Draw A normally with variance 1 / fan-in and zero B, so that the branch adds nothing yet."""
        # Drawn on the CPU: the same on every device.
        self.down.weight.copy_(torch.randn(self.down.weight.shape) * self.down.weight[0].numel() ** -0.5)
        self.up.weight.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.up(self.down(inputs))

    @torch.no_grad()
    def merge(self, layer: Layer) -> None:
        """Add the branch's product to the layer's weight, and zero the branch."""
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
        """Draw `down` normally with variance 1 / fan-in and zero the rest, so that the branch adds nothing yet."""
        for parameter in self.parameters():
            parameter.zero_()
        self.down.weight.copy_(torch.randn(self.down.weight.shape) * self.down.in_features**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.up(self.down(inputs).relu())


@torch.no_grad()
def called_in(model: nn.Module, images: Tensor, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers that a forward pass calls as modules; a branch beside any other would have no effect."""
    seen: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: seen.add(layer)) for layer in layers.values()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if layer in seen}


def low_rank_layers(backbone: nn.Module, patterns: Sequence[str]) -> dict[str, Layer]:
    """The layers by name that some pattern matches and that can have a low-rank branch.

    Those are linear layers and convolutions without groups, but not their subclasses, which may compute something else.

    Raises ConfigError for a pattern that matches none, with similar names.
    """
    known: dict[str, Layer] = {
        name: module
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    }
    found = matching(known, patterns, "strategy.layers", "the backbone's linear and convolutional layers")
    return {name: layer for name, layer in known.items() if name in found}
