"""Less-forgetting learning (Jung et al., 2016, arXiv 1607.00122)."""

from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.models.model import Output
from cl_runner.strategies.distillation import Distillation
from cl_runner.streams.base import Examples


class LFL(Distillation):
    """Keep the features of each new batch near those of the model before the task (eq. 2), and freeze the classifier's
    boundaries.

    The paper's tasks share their classes; if there are new ones, the head's rows of earlier classes are frozen. With a
    pretrained head, the first task's features are also kept near the pretrained ones.
    """

    def __init__(self, *, strength: NonNegativeFloat = 0.001, hold_head: bool = True) -> None:
        """`strength`: small, since distances are sums over all features; `hold_head`: whether to freeze the rows of
        earlier classes (algorithm 1)."""
        self.strength, self.hold_head = strength, hold_head

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if self.number == 1 and self.model.pretrained_head is None:
            return {}
        distances = (output.features - self.teacher_output(output).features).square().sum(1)
        return {"lfl": self.strength * distances.mean() / 2}

    def after_step(self, batch: Examples, output: Output) -> None:
        if self.hold_head:
            self.hold_old_rows()
