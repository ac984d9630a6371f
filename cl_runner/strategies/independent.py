"""One model per task: no forgetting and no transfer, at T times the memory."""

from torch import Tensor

from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import cloned_state, predict_by_task
from cl_runner.streams.base import Scenario, Stream, Task

LEARNED = "backbone.", "head."  # of the model's state; visible outputs follow from the stream


class Independent(Strategy):
    """Train a fresh model for every task, to be chosen by the task's id when predicting."""

    saved = ("learned",)
    scenarios = frozenset({Scenario.TASK})
    needs_task_id = True
    restarts = True

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.fresh = cloned_state(model, *LEARNED)
        self.learned: dict[int, dict[str, Tensor]] = {}

    def before_task(self, task: Task) -> None:
        head = cloned_state(self.model, "head.")  # whose new rows have just been drawn
        self.model.load_state_dict({**self.fresh, **head}, strict=False)

    def after_task(self, task: Task) -> None:
        self.learned[task.index] = cloned_state(self.model, *LEARNED)

    def predict(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return predict_by_task(self.model, images, task_ids, self.learned, {})
