"""Less-forgetting learning (Jung et al., 2016, arXiv 1607.00122)."""

from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.models.model import Output
from cl_runner.strategies.taught import Taught
from cl_runner.streams.base import Examples


class LFL(Taught):
    """Keep the features of each new batch where the model before the task puts them (eq. 2), and the classifier's
    boundaries too.

    The paper's tasks share their classes; where new ones come, the head's rows of earlier classes are held. The first
    task's features are held too where the model came with a pretrained head.
    """

    def __init__(self, *, strength: NonNegativeFloat = 1.0, hold_head: bool = True) -> None:
        """`hold_head`: whether the rows of earlier classes stay as they were before the task (algorithm 1)."""
        self.strength, self.hold_head = strength, hold_head

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if self.number == 1 and self.model.pretrained_head is None:
            return {}
        distances = (output.features - self.taught(output).features).square().sum(1)
        return {"lfl": self.strength * distances.mean() / 2}

    def after_step(self, batch: Examples, output: Output) -> None:
        if self.hold_head:
            self.hold_old_rows()
