"""L1 regularisation, towards zero or earlier weights."""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.models.model import Output
from cl_runner.strategies.norms import NormPenalty, Towards
from cl_runner.streams.base import Examples


class L1(NormPenalty):
    """Add strength * ||weights - anchor||_1 to the loss."""

    def __init__(self, *, strength: NonNegativeFloat = 1e-4, towards: Towards = "zero") -> None:
        super().__init__(strength, towards)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        distances = self.distances()
        return {"l1": self.strength * torch.stack([d.abs().sum() for d in distances]).sum()} if distances else {}
