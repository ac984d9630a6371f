"""Memory aware synapses (Aljundi et al., 2018, arXiv 1711.09601)."""

from pydantic import NonNegativeFloat

from cl_runner.fisher.estimators import Logits
from cl_runner.fisher.magnitudes import Magnitudes
from cl_runner.models.model import Model
from cl_runner.ranges import Count, Seed
from cl_runner.strategies.importance import Accumulation, Importance
from cl_runner.streams.base import Stream, Task


class MAS(Importance):
    """Penalise changes of each weight by how much the outputs depend on it: the mean over samples of |d||z||^2/dw|,
    summed over tasks (eq. 2, 3); no labels are needed.

    The paper leaves open which outputs z are; here they are the logits of the task, unless `logits` says otherwise.
    """

    name = "mas"

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1.0,
        num_samples: Count | None = None,
        batch_size: Count = 64,
        logits: Logits = "visible",
        seed: Seed = 0,
        accumulation: Accumulation = "sum",
        head: bool = True,
    ) -> None:
        """`num_samples`, drawn by `seed` without replacement (null: all), `batch_size` (which does not change the
        result) and `logits` are as for a Fisher estimator; `accumulation`: over tasks, a sum, or an average in which
        each class counts once; `head`: whether to penalise changes of the head too."""
        super().__init__(strength, head)
        self.magnitudes = Magnitudes(num_samples=num_samples, batch_size=batch_size, logits=logits, seed=seed)
        self.accumulation: Accumulation = accumulation

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.magnitudes.check(model, stream.image_shape)

    def after_task(self, task: Task) -> None:
        if task.index < len(self.stream) - 1:  # no later task could change the last one's weights
            importance = self.magnitudes(self.model, task.train).diagonal()
            self.anchor(self.accumulated(importance, task, self.accumulation))
