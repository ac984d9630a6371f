"""L2 regularisation, towards zero or earlier weights (towards pretrained ones: L2-SP, Li et al., 2018,
arXiv 1802.01483, except that decay of the new head is the optimizer's weight_decay)."""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.models.model import Output
from cl_runner.strategies.norms import NormPenalty, Towards
from cl_runner.streams.base import Examples


class L2(NormPenalty):
    """Add strength / 2 * ||weights - anchor||_2^2 to the loss."""

    def __init__(self, *, strength: NonNegativeFloat = 1e-2, towards: Towards = "zero") -> None:
        super().__init__(strength, towards)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        distances = self.distances()
        if not distances:
            return {}
        return {"l2": self.strength / 2 * torch.stack([d.square().sum() for d in distances]).sum()}
