"""Measure what EWC's penalty adds to a training step, on one thread.

    python benchmarks/penalty.py [mlp] [resnet18] [--rounds 15]

mlp: 784-400-400-10, batch 128, Adam. resnet18: width 64, 3x3 stem, images of 3x32x32, batch 32, SGD. Pixels, Fishers
and anchors are random: the work is the same, and nothing is downloaded. The runner's own step is timed with Finetune,
which has no penalty, with EWC after 1 and 10 tasks, and with one term per task differentiated by plain autograd. Each
round times all of them in turn; the figures are medians, and the overhead is the median of the rounds' ratios. Times
are processor time, which other load on the machine affects less than wall-clock time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from stream import stream_of
from torch import Tensor

from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Exact
from cl_runner.models.architecture import Architecture
from cl_runner.models.mlp import MLP
from cl_runner.models.model import Model, Output, Parameters, trainable
from cl_runner.models.resnet import ResNet18
from cl_runner.schedulers import constant
from cl_runner.strategies import EWC, Finetune, Strategy
from cl_runner.strategies.anchors import Anchor
from cl_runner.streams.base import Examples, Shape
from cl_runner.trainer import Trainer, Training


class Autograd(EWC):
    """The same penalty as one term per task, differentiated by plain autograd."""

    def hold(self, terms: list[tuple[Diagonal, Anchor]]) -> None:
        self.terms = terms

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        live = trainable(self.model)
        values = [fisher.quadratic(anchor.distance(live)) for fisher, anchor in self.terms]
        return {"ewc": self.factor * self.strength * torch.stack(values).sum()}


class Merged(EWC):
    """EWC itself, with given Fishers and anchors."""

    def hold(self, terms: list[tuple[Diagonal, Anchor]]) -> None:
        for fisher, anchor in terms:
            self.previous = self.previous.plus(fisher, anchor.weights)


def tasks_of(model: Model, number: int) -> list[tuple[Diagonal, Anchor]]:
    def near(values: Parameters) -> Parameters:
        return {name: value + 0.01 * torch.randn_like(value) for name, value in values.items()}

    weights = Anchor.at(model).weights
    rows = torch.ones(model.head.out_features, dtype=torch.bool)
    return [
        (Diagonal({name: torch.rand_like(value) for name, value in weights.items()}), Anchor(near(weights), rows))
        for _ in range(number)
    ]


def step_of(
    architecture: Architecture,
    shape: Shape,
    batch_size: int,
    optimizer: Callable,
    tasks: int,
    kind: type,
) -> Callable[[], object]:
    """One training step of the runner with a strategy of this kind after this many tasks."""
    stream = stream_of(shape, 10, batch_size)
    (task,) = stream.tasks
    model: Model = architecture.build(stream)
    strategy: Strategy = kind(fisher=Exact(), strength=1.0) if tasks else kind()
    strategy.setup(model, stream)
    if isinstance(strategy, (Autograd, Merged)):
        strategy.hold(tasks_of(model, tasks))
    trainer = Trainer(iterations=1, batch_size=batch_size)
    training = Training(trainer, model, strategy, optimizer, constant, lambda row: None)
    model.reveal(task)
    training.learn(task, task.train)  # makes the optimizer, and warms up
    return partial(training.step, task.train)


def seconds(step: Callable[[], object], steps: int) -> float:
    step()  # untimed: warms the caches and the allocator after the others
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


WORKS = {
    # name: architecture, image shape, batch size, optimizer, steps per round, goal
    "mlp": (MLP(widths=[400, 400]), (1, 28, 28), 128, partial(torch.optim.Adam, lr=1e-4), 20, "<= 25 %"),
    "resnet18": (ResNet18(), (3, 32, 32), 32, partial(torch.optim.SGD, lr=1e-4), 1, "<= 5 %"),
}
RIVALS = [("none", 0, Finetune), *((f"{n}, {k.__name__.lower()}", n, k) for n in (1, 10) for k in (Merged, Autograd))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; none: all")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if unknown := set(arguments.works) - set(WORKS):
        parser.error(f"expected some of {', '.join(WORKS)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, median of {arguments.rounds} rounds", file=sys.stderr)
    print("| work | tasks held, and how | step, CPU ms | penalty adds | goal |")
    print("|---|---|---|---|---|")
    for work in arguments.works or WORKS:
        architecture, shape, batch_size, optimizer, steps, goal = WORKS[work]
        racers = {name: step_of(architecture, shape, batch_size, optimizer, n, kind) for name, n, kind in RIVALS}
        taken: dict[str, list[float]] = {name: [] for name in racers}
        for _ in range(arguments.rounds):
            for name, step in racers.items():
                taken[name].append(seconds(step, steps))
        for name, times in taken.items():
            ratios = [time / bare for time, bare in zip(times, taken["none"], strict=True)]
            added = "-" if name == "none" else f"{100 * (statistics.median(ratios) - 1):+.1f} %"
            wanted = goal if name.endswith("merged") else "-"
            print(f"| {work} | {name} | {1000 * statistics.median(times):.2f} | {added} | {wanted} |")


if __name__ == "__main__":
    main()
