"""A head of cosines between features and class embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Linear):
    """Logits are cosines between features and class embeddings, times a learned scale, without a bias (Gidaris &
    Komodakis, 2018, arXiv 1804.09458)."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))

    def cosines(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, K]."""
        return F.linear(F.normalize(features), F.normalize(self.weight))

    @torch.no_grad()
    def as_linear(self) -> dict[str, Tensor]:
        """The state of a linear layer with the same predictions, and the same logits for features of length one."""
        return {"weight": self.scale * F.normalize(self.weight), "bias": self.weight.new_zeros(self.out_features)}

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * self.cosines(input)
