"""Base class of methods that train prompts for a frozen vision transformer."""

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_runner.models.architecture import Architecture, seeded
from cl_runner.models.model import Model, Output
from cl_runner.models.prompts import Prompts, vision_transformer
from cl_runner.randomness import derive_seed
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task
from cl_runner.streams.recipe import Recipe

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Prompting(Strategy):
    """Train prompts and the head; a finished run's file of weights does not hold the prompts."""

    saved = ("on",)
    active_logits = "current"  # as in the paper
    rewires = True
    for_pretrained = True
    extends_backbone = True
    carries_over = True
    strength: float  # of the prompts' own loss

    @abstractmethod
    def prompts_for(self, backbone: "VisionTransformer", num_tasks: int) -> Prompts:
        """The prompts to train. Raises ConfigError for arguments that do not fit the transformer."""

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        backbone = vision_transformer(model.outline.backbone, type(self).__name__)
        with torch.device("meta"):
            self.prompts_for(backbone, stream.max_tasks or stream.num_tasks)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        backbone = vision_transformer(model.backbone, type(self).__name__)
        backbone.requires_grad_(False)
        model.keep_in_eval(backbone.modules())
        with seeded(derive_seed(model.seed, "prompts")):
            self.prompts = self.prompts_for(backbone, len(stream)).to(model.device)
        self.prompts.enter(backbone)
        model.add_module("prompts", self.prompts)

    @property
    def on(self) -> bool:
        """Off until the first task begins: drift is measured from the pretrained model without prompts."""
        return self.prompts.on

    @on.setter
    def on(self, value: bool) -> None:
        self.prompts.on = value

    def before_task(self, task: Task) -> None:
        self.on = True
        self.prompts.begin(task.index)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        loss, self.prompts.loss = self.prompts.loss, None
        return {} if loss is None else {"matching": self.strength * loss}

    def after_task(self, task: Task) -> None:
        self.prompts.keep(task.index)
