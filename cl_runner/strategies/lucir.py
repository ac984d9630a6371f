"""LUCIR: learning a unified classifier incrementally via rebalancing (Hou et al., 2019, CVPR)."""

from dataclasses import replace

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.models.cosine import CosineHead
from cl_runner.models.model import Model, Output
from cl_runner.ranges import Count
from cl_runner.strategies.distillation import Exemplars, precise
from cl_runner.streams.base import Examples, Scenario, Stream, Task


class LUCIR(Exemplars):
    """Classify by cosines alone, distil the directions of features, and keep exemplars of old classes a margin away
    from the most similar new classes (eq. 3, 6 and 8). The embeddings of old classes are frozen.

    Deviations: features are the backbone's own, where the paper removes the last ReLU (model.last_relu=false does so
    for resnet18); new embeddings start at random; there is no final fine-tuning on balanced data. The authors' code
    starts the scale of the cosines at 1 and averages the ranking term over the negatives, which the paper and we sum:
    at the same `margin_strength` its term is smaller by their number. The features' term grows with the ratio of old to
    new classes, as in that code; the paper prints its inverse. The paper's memory is herding. A finished run's file of
    weights holds the classifier as a linear layer, which predicts the same classes but is more confident of longer
    features.
    """

    saved = (*Exemplars.saved, "balance")
    rewires = True
    scenarios = frozenset({Scenario.CLASS})  # in others, new classes do not compete with old ones

    def __init__(
        self,
        *,
        memory: Memory,
        strength: NonNegativeFloat = 5.0,
        margin: NonNegativeFloat = 0.5,
        margin_strength: NonNegativeFloat = 1.0,
        negatives: Count = 2,
        scale: PositiveFloat = 10.0,
        hold_head: bool = True,
    ) -> None:
        """`strength`: of the features' term, times sqrt(old classes / new classes); `margin` and `margin_strength`: of
        the ranking term; `negatives`: how many new classes it takes; `scale`: initial scale of the cosines;
        `hold_head`: whether to freeze old embeddings."""
        super().__init__(memory=memory)
        self.strength, self.hold_head = strength, hold_head
        self.margin, self.margin_strength, self.negatives = margin, margin_strength, negatives
        self.first_scale = scale

    def setup(self, model: Model, stream: Stream) -> None:
        model.head = CosineHead(model.head.in_features, model.head.out_features, self.first_scale).to(model.device)
        super().setup(model, stream)
        self.balance = 0.0

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.balance = (int(self.old.sum()) / max(1, len(self.new))) ** 0.5

    def before_batch(self, batch: Examples) -> Examples:
        old = self.old[batch.labels]
        # The mean over all rows of weight * loss is the mean loss of the old ones, even over micro-batches.
        weights = old * (len(batch) / old.sum().clamp(min=1))
        return replace(batch, extras=batch.extras | {"margin": weights})

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if self.number == 1:
            return {}
        now, before = precise(output.features), precise(self.teacher_output(output).features)
        turned = 1 - F.cosine_similarity(now, before)
        terms = {"lucir": self.strength * self.balance * turned.mean()}
        if len(self.new):
            terms["lucir_margin"] = self.margin_strength * self._ranking(batch, output)
        return terms

    def after_step(self, batch: Examples, output: Output) -> None:
        if self.hold_head:
            self.hold_old_rows()

    def _ranking(self, batch: Examples, output: Output) -> Tensor:
        """The margin ranking loss, averaged over the rows of old classes; a scalar."""
        assert isinstance(self.model.head, CosineHead)
        cosines = self.model.head.cosines(output.features)
        own = cosines.gather(1, batch.labels[:, None])
        hardest = cosines[:, self.new].topk(min(self.negatives, len(self.new)), dim=1).values
        losses = (self.margin - own + hardest).clamp(min=0).sum(1)
        return (batch.extras["margin"] * losses).mean()
