"""Multi-layer perceptrons."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from cl_runner.models.architecture import Architecture
from cl_runner.models.heads import Init, draw
from cl_runner.models.weights import Net
from cl_runner.randomness import derive_seed
from cl_runner.ranges import Count
from cl_runner.streams.base import Shape

Activation = Literal["relu", "leaky_relu", "gelu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


def perceptron(
    inputs: int, widths: Sequence[int], activation: Activation = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """[B, ...], flattened to [B, inputs] -> [B, widths[-1]]: linear layer, activation and dropout per width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, width in enumerate(widths, start=1):
        layers[f"linear{index}"] = nn.Linear(inputs, width)
        layers[f"activation{index}"] = ACTIVATIONS[activation]()
        layers[f"dropout{index}"] = nn.Dropout(dropout)
        inputs = width
    return nn.Sequential(layers)


@dataclass(frozen=True, kw_only=True)
class MLP(Architecture):
    """Fully connected layers over the flattened image.

    widths: of the hidden layers, the last of which gives the features. activation, dropout (a probability): after each.
    init: of the hidden layers, like `head_init` for the head.
    """

    widths: Annotated[Sequence[Count], Field(min_length=1)] = (400, 400)
    activation: Activation = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: Init = "torch"

    def network(self, shape: Shape, published: bool) -> Net:
        layers = perceptron(prod(shape), self.widths, self.activation, self.dropout)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "backbone"))
        for layer in layers:
            if isinstance(layer, nn.Linear) and self.init != "torch":
                draw(layer, self.init, generator)
        return Net(layers)
