"""iCaRL: incremental classifier and representation learning (Rebuffi et al., 2017, arXiv 1611.07725)."""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.models.model import Model, Output
from cl_runner.strategies.distillation import Exemplars, precise
from cl_runner.strategies.inference import CHUNK, features_of
from cl_runner.streams.base import Examples, Scenario, Stream, Task


class ICaRL(Exemplars):
    """Train one-vs-rest outputs, distil those of earlier classes, and predict the class with the nearest mean of
    exemplars' features (algorithms 1 and 3).

    Losses are summed over outputs and averaged over rows. The paper's memory is herding. Outputs of earlier classes are
    trained by the teacher alone, so a task without new classes learns nothing from labels.
    """

    saved = (*Exemplars.saved, "means")
    scenarios = frozenset({Scenario.TASK, Scenario.CLASS})  # if tasks share their classes, no labels are learned

    def __init__(self, *, memory: Memory, temperature: PositiveFloat = 1.0) -> None:
        """`temperature`: of the teacher's probabilities; 1 in the paper, 2 in van de Ven's code."""
        super().__init__(memory=memory)
        self.temperature = temperature

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.means = model.head.weight.new_zeros(stream.num_classes, model.head.in_features)  # [K, D], of length one

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        wanted = F.one_hot(batch.labels, len(self.old)).to(output.logits)
        return _cross_entropies(output.logits, wanted, self.model.visible[batch.task_ids] & ~self.old)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if self.number == 1:
            return {}
        wanted = (precise(self.teacher_output(output).logits) / self.temperature).sigmoid()
        return {"icarl": _cross_entropies(output.logits, wanted, self.old.expand_as(wanted))}

    def after_task(self, task: Task) -> None:
        super().after_task(task)
        features, means = features_of(self.model), torch.zeros_like(self.means)
        for some in self.memory.examples.batches(CHUNK):
            some = some.to(means.device)
            means.index_add_(0, some.labels, F.normalize(features(some.images)).to(means))
        self.means = F.normalize(means)  # so sums do as well as means

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """Cosines: among vectors of length one, the largest marks the nearest."""
        scores = F.normalize(self.model(images).features).to(self.means) @ self.means.T
        return scores.masked_fill(~self.means.any(1), -torch.inf)


def _cross_entropies(logits: Tensor, wanted: Tensor, entering: Tensor) -> Tensor:
    """Binary cross-entropies, summed over the `entering` outputs and averaged over the batch; all [B, K]."""
    losses = F.binary_cross_entropy_with_logits(precise(logits), precise(wanted), reduction="none")
    return (losses * entering).sum(1).mean()
