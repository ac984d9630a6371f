"""Low-rank adaptation of a frozen backbone for each task (LoRA: Hu et al., 2022, arXiv 2106.09685)."""

import logging
from collections.abc import Sequence

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.models.adapters import LowRank, called_in, low_rank_layers
from cl_runner.models.architecture import Architecture, norm_layers
from cl_runner.models.model import Model
from cl_runner.ranges import Count
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import cloned_state, evaluating, predict_by_task
from cl_runner.streams.base import Scenario, Stream, Task
from cl_runner.streams.recipe import Recipe

log = logging.getLogger("cl_runner")


class LoRA(Strategy):
    """Train the head and a low-rank update of each layer's weight (eq. 3).

    With `merge`, each task's update is added to the weights when it has been learned, and the next task starts from
    there. Otherwise the backbone stays as it came and each task keeps its own updates, chosen by the task's id; a
    finished run's file of weights then holds the backbone without them.

    The paper adapts a language model to one task, by its attention's query and value weights alone; here every linear
    layer and convolution has an update unless `layers` says otherwise. A is drawn normally with variance 1 / fan-in.
    """

    saved = ("learned",)
    rewires = True
    for_pretrained = True
    extends_backbone = True
    redraws = True

    def __init__(
        self,
        *,
        rank: Count = 8,
        alpha: PositiveFloat = 8.0,
        layers: Sequence[str] = ("*",),
        merge: bool = True,
    ) -> None:
        """`alpha`: the update is alpha / rank * B A; `layers`: patterns for the names of the backbone's linear layers
        and ungrouped convolutions."""
        self.rank, self.alpha, self.patterns, self.merge = rank, alpha, layers, merge

    @property
    def needs_task_id(self) -> bool:
        return not self.merge

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        if not self.merge and stream.scenario != Scenario.TASK:
            told = "with stream.scenario=task (unmerged LoRAs are chosen by the task's id)"
            raise ConfigError("strategy.merge", f"expected false only {told}, got {stream.scenario}")
        low_rank_layers(model.outline.backbone, self.patterns)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        named = low_rank_layers(model.backbone, self.patterns)
        with evaluating(model):
            blank = torch.zeros(1, *stream.image_shape, dtype=torch.uint8, device=model.device)
            called = called_in(model, blank, named)
        if passed_over := [name for name in named if name not in called]:
            if not called:
                got = f"expected layers that the backbone calls as modules, got {passed_over[0]}"
                raise ConfigError("strategy.layers", got)
            log.warning(
                "lora: no branch beside %d layers not called as modules, %s first", len(passed_over), passed_over[0]
            )
        # Frozen layers stay as they are.
        self.layers = [layer for layer in called.values() if layer.weight.requires_grad]
        self.branches = [LowRank(layer, self.rank, self.alpha).to(model.device) for layer in self.layers]
        for branch, layer in zip(self.branches, self.layers, strict=True):
            branch.beside(layer)
        model.backbone.requires_grad_(False)
        model.keep_in_eval(norm_layers(model.backbone, None))
        model.add_module("adapters", nn.ModuleList(self.branches))
        self.learned: dict[int, dict[str, Tensor]] = {}

    def before_task(self, task: Task) -> None:
        for branch in self.branches:
            branch.reset()

    def after_task(self, task: Task) -> None:
        if not self.merge:
            self.learned[task.index] = cloned_state(self.model, "adapters.")
            return
        for branch, layer in zip(self.branches, self.layers, strict=True):
            branch.merge(layer)

    @property
    def predicts_by_weights(self) -> bool:
        return self.merge

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        if self.merge:
            return super().predict(images, task_ids)
        return predict_by_task(self.model, images, task_ids, self.learned, {})
