"""Maximally interfered retrieval (Aljundi et al., 2019, arXiv 1908.04742, ER-MIR, eq. 1)."""

import torch
from pydantic import PositiveFloat

from cl_runner.errors import ConfigError
from cl_runner.memory.base import Memory
from cl_runner.models.model import trainable
from cl_runner.models.substitute import call_with
from cl_runner.ranges import Count
from cl_runner.strategies.inference import evaluating
from cl_runner.strategies.rehearsal import Rehearsal, Store
from cl_runner.streams.base import Examples


class MIR(Rehearsal):
    """Experience replay of the rows whose loss would increase most by a step on the fresh rows alone.

    This virtual step is one of plain SGD, in eval mode to leave statistics alone. Deviation: rows of the task being
    learned may be drawn too (not with store=task), which the authors' code excludes.
    """

    def __init__(
        self,
        *,
        memory: Memory,
        replay_batch_size: Count | None = 10,
        store: Store = "step",
        candidates: Count = 50,
        virtual_lr: PositiveFloat = 0.001,
    ) -> None:
        """`candidates`: drawn from memory, of which `replay_batch_size` are replayed (null: as many as are fresh, or
        all, if a batch is that large); `virtual_lr`: of the virtual step, small enough for it to lower the fresh rows'
        loss (the paper's is that of training, for nets from scratch; 0.1 throws a pretrained one far off)."""
        super().__init__(memory=memory, replay_batch_size=replay_batch_size, store=store)
        if replay_batch_size is not None and replay_batch_size >= candidates:
            given = f"expected more than replay_batch_size={replay_batch_size}, to choose from, got {candidates}"
            raise ConfigError("strategy.candidates", given)
        self.candidates, self.virtual_lr = candidates, virtual_lr

    def replay(self, batch: Examples) -> Examples:
        drawn = self.memory.sample(self.candidates).to(batch.labels.device)
        with evaluating(self.model):
            gradient = self.gradient(batch)
            with torch.no_grad():
                steps = zip(trainable(self.model).items(), gradient, strict=True)
                moved = {name: value - self.virtual_lr * slope for (name, value), slope in steps}
                before = self.row_losses(drawn, self.model(drawn.images))
                after = self.row_losses(drawn, call_with(self.model, moved, drawn.images))
        worst = (after - before).topk(min(self.replay_batch_size or len(batch), len(drawn))).indices
        return drawn[worst]
