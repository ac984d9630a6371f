"""Dropout against forgetting (Goodfellow et al., 2014, arXiv 1312.6211; Mirzadeh et al., 2020, arXiv 2004.11545)."""

from typing import Annotated

from pydantic import Field
from torch import nn

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Stream


class Dropout(Strategy):
    """Fine-tune with dropout of this rate in the backbone's dropout layers, and before the head if it ends in none."""

    def __init__(self, *, rate: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> None:
        self.rate = rate

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        layers = [module for module in model.backbone.modules() if not isinstance(module, nn.Identity)]
        ends_in_dropout = isinstance(layers[-1], nn.Dropout)
        for layer in layers if ends_in_dropout else [*layers, model.dropout]:
            if isinstance(layer, nn.Dropout):
                layer.p = self.rate
