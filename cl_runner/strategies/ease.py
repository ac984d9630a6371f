"""EASE: expandable subspace ensemble (Zhou et al., 2024, arXiv 2403.12030)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from cl_runner.models.adapters import Bottleneck
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Model
from cl_runner.models.prompts import vision_transformer
from cl_runner.models.substitute import call_with
from cl_runner.ranges import Count
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import cloned_state, extract_features, float64_device
from cl_runner.strategies.subspaces import Subspaces
from cl_runner.streams.base import Stream, Task
from cl_runner.streams.recipe import Recipe


class EASE(Strategy):
    """Learn adapters for each task beside a frozen vision transformer; answer from class means under all of them.

    Each task's adapters are learned from scratch with the head, stand beside every block's MLP, and then stay: they
    span a subspace of their own. A class's score is the mean over subspaces of the cosine between features and its mean
    there, counted `alpha` times in those of other tasks (the paper's sum, divided by what would be larger for a class
    that comes back). Means that old classes would have in a new subspace are made up from those of the new classes they
    resemble. An answer takes a pass through the network for each task so far, and what it takes beside the backbone is
    not in a finished run's file of weights.

    The loss sees the task's own outputs alone. Other than in the authors' code, adapters are learned with a linear
    head, not one of cosines, and without dropout; they see what the MLP sees, the normed tokens, and add to what it
    says before a LayerScale does; `down` begins normal with variance 1 / fan-in, where theirs is uniform with a third
    of that; their width for CIFAR is 64; `alpha` is not divided by the number of tasks; and old means are made up from
    the classes of the subspace's own task.
    """

    saved = ("learned", "subspaces")
    active_logits = "current"  # as in the paper
    rewires = True
    for_pretrained = True
    extends_backbone = True
    redraws = True

    def __init__(
        self,
        *,
        width: Count = 16,
        scale: PositiveFloat = 0.1,
        alpha: NonNegativeFloat = 0.1,
        batch_size: Count = 256,
    ) -> None:
        """`width`: of the adapters' bottleneck; `scale`: of what they add."""
        self.width, self.scale, self.alpha, self.batch_size = width, scale, alpha, batch_size

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        vision_transformer(model.outline.backbone, type(self).__name__)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        backbone = vision_transformer(model.backbone, type(self).__name__)
        backbone.requires_grad_(False)
        model.hold_statistics(backbone.modules())
        self.adapters = [Bottleneck(backbone.embed_dim, self.width, self.scale) for _ in backbone.blocks]
        for adapter, block in zip(self.adapters, backbone.blocks, strict=True):
            adapter.to(model.device).beside(block.get_submodule("mlp"))
        model.add_module("adapters", nn.ModuleList(self.adapters))
        classes = [task.classes for task in stream.tasks]
        self.subspaces = Subspaces(classes, stream.num_classes, model.head.in_features, float64_device(model.device))
        self.learned: list[dict[str, Tensor]] = []  # each task's adapters, by the model's names for them

    def before_task(self, task: Task) -> None:
        for adapter in self.adapters:
            adapter.reset()

    def after_task(self, task: Task) -> None:
        self.learned.append(cloned_state(self.model, "adapters."))
        for space, weights in enumerate(self.learned):
            self.subspaces.add(space, *extract_features(self.model, task.train, self.batch_size, weights))

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        spaces = self.learned or [{}]  # asked before the first task, there are no means yet to compare with
        features = [call_with(self.model, weights, images).features for weights in spaces]
        return self.subspaces.scores(features, self.alpha).to(images.device, torch.float32)
