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
    """Train adapters for each task beside a frozen vision transformer; predict from class means under all of them.

    Each task's adapters, parallel to every block's MLP, are trained from scratch with the head and then frozen: they
    define a subspace. The score of class k is sum_s a_sk cos(f_s(x), m_sk) / sum_s a_sk, with the features f_s and the
    class mean m_sk in subspace s, and a_sk = 1 in those of the class's own tasks, else `alpha` (the paper's sum,
    normalised, or a recurring class would score higher). The mean of an old class in a new subspace is synthesised from
    the new classes j: sum_j softmax_j(cos(m_tk, m_tj)) m_sj, t the subspace of its own task. A prediction takes one
    pass through the network per task so far; adapters and means are not in a finished run's file of weights.

    The loss sees only the task's own outputs. Unlike in the authors' code, adapters are trained with a linear head, not
    a cosine one, and without dropout; they get the MLP's own input, the normalised tokens, and add to its output before
    any LayerScale; `down` is initialised normally with variance 1 / fan-in, where theirs is uniform with a third of
    that; their width for CIFAR is 64; `alpha` is not divided by the number of tasks; and old means are synthesised from
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
        """`width`: of the adapters' bottleneck; `scale`: of their output."""
        self.width, self.scale, self.alpha, self.batch_size = width, scale, alpha, batch_size

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        vision_transformer(model.outline.backbone, type(self).__name__)

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        backbone = vision_transformer(model.backbone, type(self).__name__)
        backbone.requires_grad_(False)
        model.keep_in_eval(backbone.modules())
        self.adapters = [Bottleneck(backbone.embed_dim, self.width, self.scale) for _ in backbone.blocks]
        for adapter, block in zip(self.adapters, backbone.blocks, strict=True):
            adapter.to(model.device).beside(block.get_submodule("mlp"))
        model.add_module("adapters", nn.ModuleList(self.adapters))
        classes = [task.classes for task in stream.tasks]
        self.subspaces = Subspaces(classes, stream.num_classes, model.head.in_features, float64_device(model.device))
        self.learned: list[dict[str, Tensor]] = []  # each task's adapters, by parameter name in the model

    def before_task(self, task: Task) -> None:
        for adapter in self.adapters:
            adapter.reset()

    def after_task(self, task: Task) -> None:
        self.learned.append(cloned_state(self.model, "adapters."))
        for space, weights in enumerate(self.learned):
            self.subspaces.add(space, *extract_features(self.model, task.train, self.batch_size, weights))

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        spaces = self.learned or [{}]  # before the first task there are no adapters, and no means to compare with
        features = [call_with(self.model, weights, images).features for weights in spaces]
        return self.subspaces.scores(features, self.alpha).to(images.device, torch.float32)
