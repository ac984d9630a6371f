"""Averaged gradient episodic memory (Chaudhry et al., 2019, arXiv 1812.00420)."""

import torch
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.ranges import Count
from cl_runner.strategies.rehearsal import Rehearsal, Store
from cl_runner.streams.base import Examples


class AGEM(Rehearsal):
    """Project out of each gradient what would, to first order, increase the loss on a batch from memory (eq. 11)."""

    def __init__(self, *, memory: Memory, replay_batch_size: Count | None = None, store: Store = "task") -> None:
        """See Rehearsal; with store=step, the memory also holds rows of the task being learned."""
        super().__init__(memory=memory, replay_batch_size=replay_batch_size, store=store)

    def with_replay(self, batch: Examples) -> Examples:
        self.reference = self.replay(batch) if len(self.memory) else None
        return batch

    def after_backward(self) -> None:
        if self.reference is None:
            return
        learning = self.learning
        reference = self.gradient(self.reference)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        # A branch on the sign would wait for the device.
        share = _dot(own, reference).clamp(max=0) / _dot(reference, reference).clamp(min=torch.finfo().tiny)
        for parameter, gradient, direction in zip(learning, own, reference, strict=True):
            parameter.grad = gradient.sub_(share * direction)  # in place: fused optimizers go by strides


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
