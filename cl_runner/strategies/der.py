"""Dark experience replay (Buzzega et al., 2020, arXiv 2004.07211)."""

from dataclasses import replace

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.models.model import Output
from cl_runner.ranges import Count
from cl_runner.strategies.inference import CHUNK, evaluating
from cl_runner.strategies.rehearsal import Rehearsal, weighted
from cl_runner.streams.base import Examples, Task


class DER(Rehearsal):
    """Keep answering for remembered rows as the model did when they were stored.

    As in the authors' code, the squares of the logits' differences are averaged over the outputs, where the paper
    writes their sum; fresh and replayed rows go through the model in one batch, not in two. All outputs are active from
    the start, so that the stored logits of classes to come say that these are not meant. Told otherwise by
    trainer.active_logits, an output that is revealed later is held to what it answers then, untrained.
    """

    active_logits = "all"  # as in the paper

    def __init__(
        self, *, memory: Memory, alpha: NonNegativeFloat = 0.5, replay_batch_size: Count | None = None
    ) -> None:
        """`alpha`: of the logits' mean squared error; nothing is drawn for a term of weight zero."""
        super().__init__(memory=memory, replay_batch_size=replay_batch_size, store="step")
        self.terms = [{"label": 0.0, "logit": alpha}]  # weights of the losses on each draw from memory

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        """Complete the stored logits by those of the outputs that have been revealed just now."""
        with evaluating(self.model):
            for rows in self.memory.examples.batches(CHUNK) if len(self.memory) else ():
                stored, answers = rows.extras["logits"], self.model(rows.images.to(self.model.device)).logits
                missing = ~stored.isfinite() & self.model.revealed.to(stored.device)
                stored.copy_(torch.where(missing, answers.to(stored), stored))

    def with_replay(self, batch: Examples) -> Examples:
        nothing = torch.full((len(batch), self.stream.num_classes), -torch.inf, device=batch.labels.device)
        parts = [(replace(batch, extras={"logits": nothing}), {"label": 1.0, "logit": 0.0})]
        if len(self.memory):
            parts += [(self.replay(batch), weights) for weights in self.terms if any(weights.values())]
        return weighted(parts)

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        return (batch.extras["label"] * self.row_losses(batch, output)).mean()

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        stored = batch.extras["logits"]
        known = stored.isfinite()
        squares = torch.where(known, output.logits - stored, 0.0).square()
        errors = squares.sum(1) / known.sum(1).clamp(min=1)  # [B]
        return {"der": (batch.extras["logit"] * errors).mean()}

    def to_store(self, fresh: Examples, output: Output) -> Examples:
        logits = output.logits.detach()[: len(fresh)].float()
        return replace(fresh, extras={"logits": logits.masked_fill(~self.model.revealed, -torch.inf)})
