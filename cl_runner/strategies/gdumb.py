"""GDumb: greedily sample, dumbly learn (Prabhu et al., 2020, ECCV)."""

from cl_runner.memory.base import Memory
from cl_runner.models.model import Model
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import features_of
from cl_runner.streams.base import Examples, Stream, Task


class GDumb(Strategy):
    """Train, from the weights that the model came with, on what a balanced memory holds and nothing else.

    The paper's memory, its greedy balancing sampler (algorithm 1), is class_balanced here. Its CutMix and cosine
    restarts are left out: optimizer, schedule and budget are the run's, and an epoch is a pass over the memory, so that
    a small one needs many (the paper trains to the end, for some 250).
    """

    saved = ("memory",)
    restarts = True

    def __init__(self, *, memory: Memory) -> None:
        self.memory = memory

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.memory.warn_of_lack(stream, each_class=True)
        self.initial_state = {name: value.clone() for name, value in model.backbone.state_dict().items()}

    def before_task(self, task: Task) -> None:
        model = self.model
        self.memory.add_task(task.train, features_of(model))
        model.backbone.load_state_dict(self.initial_state)
        model.draw_head(task, model.revealed)

    def training_data(self, task: Task) -> Examples:
        return self.memory.examples
