"""One model a task: no forgetting and no transfer, at T times the memory."""

import torch
from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.models.substitute import call_with
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Scenario, Stream, Task


class Independent(Strategy):
    """Learn every task with a fresh model, which only a told task can choose."""

    saved = ("learned",)
    scenarios = frozenset({Scenario.TASK})
    needs_task_id = True

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.fresh = _weights(model)
        self.learned: dict[int, dict[str, Tensor]] = {}

    def before_task(self, task: Task) -> None:
        rows = {name: value for name, value in _weights(self.model).items() if name.startswith("head.")}
        self.model.load_state_dict({**self.fresh, **rows}, strict=False)  # the head's rows were drawn just now

    def after_task(self, task: Task) -> None:
        self.learned[task.index] = _weights(self.model)

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        scores = images.new_zeros(len(images), self.stream.num_classes, dtype=torch.float32)
        for task in task_ids.unique().tolist():
            of_task = task_ids == task
            weights = self.learned.get(task, self.fresh)
            scores[of_task] = call_with(self.model, weights, images[of_task]).logits.float()
        return scores


def _weights(model: Model) -> dict[str, Tensor]:
    """All that learning changes; which outputs are visible is the stream's, not the weights'."""
    own = ("backbone.", "head.")
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name.startswith(own)}
