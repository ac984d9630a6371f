"""BiC: bias correction (Wu et al., 2019, arXiv 1905.13260)."""

import logging
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.models.model import Model, Output
from cl_runner.randomness import derive_seed, task_seed
from cl_runner.ranges import Seed
from cl_runner.strategies.distillation import Exemplars, precise
from cl_runner.strategies.inference import CHUNK, evaluating
from cl_runner.streams.base import Examples, Scenario, Stream, Task, concatenate

log = logging.getLogger("cl_runner")


class BiC(Exemplars):
    """Train on exemplars with distillation; then correct the bias towards new classes by a scale and a shift of their
    logits, fitted on held-out rows, the same number of each class (eq. 4, 5).

    Deviation: scale and shift are fitted to convergence by L-BFGS, not for a number of epochs; a normal prior of
    variance one around no correction replaces early stopping, as the scale that separates a few rows is unbounded. The
    teacher's logits are corrected and the student's are not, so that the network learns the correction. A task without
    new classes learns nothing from labels: its loss is distillation alone.
    """

    saved = (*Exemplars.saved, "share", "scale", "shift")
    scenarios = frozenset({Scenario.CLASS})  # in others, new classes do not compete with old ones

    def __init__(
        self,
        *,
        memory: Memory,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        temperature: PositiveFloat = 2.0,
        seed: Seed = 0,
    ) -> None:
        """`held_out`: share of each old class's exemplars reserved for fitting the correction, at least one (none, and
        so no correction, if a class has a single one); `temperature`: of the distillation; `seed`: of the choice of
        held-out rows."""
        super().__init__(memory=memory)
        self.held_out, self.temperature, self.seed = held_out, temperature, seed

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.scale = model.head.weight.new_ones(stream.num_classes)  # [K]: 1 but for the last task's classes
        self.shift = torch.zeros_like(self.scale)
        self.share = 0.0  # of old classes among those so far

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        old = int(self.old.sum())
        self.share = old / (old + len(self.new))

    def training_data(self, task: Task) -> Examples:
        return self._parts(task)[0]

    def task_loss(self, batch: Examples, output: Output) -> Tensor:
        return (1 - self.share) * super().task_loss(batch, output)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        if self.number == 1:
            return {}
        outside = ~self.old
        target = (
            precise(self.teacher_output(output).logits) * self.scale + self.shift
        )  # with the previous task's correction
        target = (target / self.temperature).masked_fill(outside, -torch.inf).softmax(1)
        student = precise(output.logits) / self.temperature
        student = student.masked_fill(outside, -torch.inf).log_softmax(1)
        losses = -(target * student.masked_fill(outside, 0)).sum(1)
        return {"bic": self.share * losses.mean()}

    def after_task(self, task: Task) -> None:
        _, balanced = self._parts(task)
        self.scale, self.shift = torch.ones_like(self.scale), torch.zeros_like(self.shift)
        if len(balanced):
            self.scale[self.new], self.shift[self.new] = self._fitted(balanced).to(self.scale)
        elif len(self.memory) and len(self.new):
            log.warning("bic: no correction in task %d: some class has a single row, which is trained on", task.index)
        super().after_task(task)

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return self.model(images).logits * self.scale + self.shift

    def _parts(self, task: Task) -> tuple[Examples, Examples]:
        """The rows to train the network on, and those to fit the correction on."""
        fresh = task.train
        if not len(self.memory):
            return fresh, fresh[:0]
        held = self.memory.examples.to(fresh.labels.device)
        back = torch.isin(fresh.labels, held.labels)  # of classes that come back: held rows of them are enough
        again, fresh = fresh[back], fresh[~back]
        if not len(fresh):
            return again + held, again[:0]
        # The trainer shuffles the task's rows by the task's own seed.
        generator = torch.Generator().manual_seed(derive_seed(task_seed(self.seed, task.index), "held out"))
        to_spare = [int(part.labels.unique(return_counts=True)[1].min()) - 1 for part in (fresh, held)]
        count = min(max(1, round(self.held_out * len(held) / len(held.labels.unique()))), *to_spare)
        kept, apart = [], []
        for examples in (fresh, held):
            chosen = _of_each_class(examples.labels.cpu(), count, generator).to(examples.labels.device)
            kept.append(examples[~chosen])
            apart.append(examples[chosen])
        return concatenate([*kept, again]), concatenate(apart)

    def _fitted(self, balanced: Examples) -> Tensor:
        """The scale and the shift [2] of the new classes' logits that fit these rows best."""
        device = self.model.device
        with evaluating(self.model), torch.no_grad():
            parts = [batch.to(device) for batch in balanced.batches(CHUNK)]
            logits = torch.cat([self.model(part.images).logits for part in parts]).cpu().double()  # not on all devices
        labels, seen = balanced.labels.cpu(), self.model.visible[balanced.task_ids.to(device)].cpu()
        new = torch.zeros(logits.shape[1], dtype=torch.bool).index_fill(0, self.new.cpu(), True)
        none = torch.tensor([1.0, 0.0], dtype=torch.float64)
        found = none.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            corrected = torch.where(new, logits * found[0] + found[1], logits)
            value = F.cross_entropy(corrected.masked_fill(~seen, -torch.inf), labels)
            value = value + (found - none).square().sum() / (2 * len(labels))
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return found.detach()


def _of_each_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N] bool: `count` rows of each class, drawn at random."""
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[order[labels[order] == label][:count]] = True
    return chosen
