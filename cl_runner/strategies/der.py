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
    """Match the logits that were stored with the remembered rows (algorithm 1).

    As in the authors' code, the squared differences of logits are averaged over the outputs, where the paper sums them;
    fresh and replayed rows pass through the model in one batch, not in two. All outputs are active from the start, so
    that stored logits rule out future classes. If trainer.active_logits says otherwise, an output revealed later is
    held to its untrained logits at that time.
    """

    active_logits = "all"  # as in the paper

    def __init__(
        self, *, memory: Memory, alpha: NonNegativeFloat = 0.5, replay_batch_size: Count | None = None
    ) -> None:
        """`alpha`: weight of the logits' mean squared error; nothing is drawn for a term of weight zero."""
        super().__init__(memory=memory, replay_batch_size=replay_batch_size, store="step")
        self.terms = [{"label": 0.0, "logit": alpha}]  # of the losses on each draw from memory

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        """Add the logits of newly revealed outputs to the stored ones."""
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
