"""Measure how far a rounding error moves synaptic intelligence: the runner beside a bare loop of the algorithm.

    python benchmarks/si_rounding.py --data-root DATA [--iterations 2000] [--nudges 3]

Class-incremental Split MNIST as in `experiment=vandeven_split_mnist_class strategy=si`, on one class order. Runner and
loop start from the same weights and learn the same batches; then the loop starts from weights that differ by one part
in a million. Prints accuracies (%) after the last task, their mean first. One thread.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from cl_runner.compose import compose_jobs
from cl_runner.config import Experiment, check
from cl_runner.folder import RunFolder
from cl_runner.job import carry_out
from cl_runner.models.model import Model
from cl_runner.randomness import seed_all, task_seed
from cl_runner.streams.base import Stream

# One of the authors' orders: they permute the labels by numpy's permutation of seed 3, so this is its inverse.
ORDER = [7, 2, 3, 8, 1, 0, 5, 6, 9, 4]
SEED = 3
NUDGE = 1e-6  # of a weight, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--iterations", type=int, default=2000, help="a task (default: %(default)s)")
    parser.add_argument("--nudges", type=int, default=3, help="loops from nudged weights (default: %(default)s)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        experiment = the_experiment(asked, folder)
        carry_out(experiment)
        runner = RunFolder(experiment.folder).results["accuracy"]["class"][-1]
        say("runner", runner)
        say("loop", loop(the_experiment(asked, folder), nudge=None))
        for draw in range(1, asked.nudges + 1):
            say(f"loop, nudged ({draw})", loop(the_experiment(asked, folder), nudge=draw))


def the_experiment(asked: argparse.Namespace, folder: str) -> Experiment:
    words = ["experiment=vandeven_split_mnist_class", "strategy=si", f"stream.class_order={ORDER}", f"seed={SEED}"]
    words += [f"trainer.iterations={asked.iterations}", f"data_root={asked.data_root}", f"output_root={Path(folder)}"]
    (cfg,) = compose_jobs([*words, "tracker=local", "device=cpu"])
    return check(cfg)


def loop(experiment: Experiment, nudge: int | None) -> list[float]:
    """The published algorithm with its penalty by autograd: accuracy on each task at the end. It uses nothing of the
    strategy or the trainer, only the stream, the model and the order of the batches."""
    settings, trainer = experiment.config["strategy"], experiment.config["trainer"]
    seed_all(SEED)
    stream: Stream = experiment.stream.load(experiment.config["data_root"], experiment.device)
    model: Model = experiment.model.build(stream, trainer["active_logits"])
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + NUDGE * torch.randn(weight.shape, generator=generator)
    weights = list(model.parameters())
    optimizer = experiment.make_optimizer(params=weights)
    importance = [torch.zeros_like(weight) for weight in weights]
    for task in stream.tasks:
        model.reveal(task)
        model.train()
        start = [weight.detach().clone() for weight in weights]
        path = [torch.zeros_like(weight) for weight in weights]
        generator, done = torch.Generator().manual_seed(task_seed(SEED, task.index)), 0
        while done < trainer["iterations"]:
            for batch in task.train.shuffled(trainer["batch_size"], generator, drop_last=True):
                if done == trainer["iterations"]:
                    break
                done += 1
                loss = F.cross_entropy(model(batch.images).logits, batch.labels)
                if task.index:
                    pulls = zip(importance, weights, start, strict=True)
                    loss = loss + settings["strength"] * sum((i * (w - s) ** 2).sum() for i, w, s in pulls)
                optimizer.zero_grad()
                loss.backward()
                before = [weight.detach().clone() for weight in weights]
                optimizer.step()
                with torch.no_grad():
                    for gone, weight, was in zip(path, weights, before, strict=True):
                        assert weight.grad is not None, "every weight is in the loss"
                        gone += weight.grad * (was - weight)
        with torch.no_grad():
            for known, gone, weight, was in zip(importance, path, weights, start, strict=True):
                known += gone / ((weight - was) ** 2 + settings["epsilon"])
    model.eval()
    with torch.no_grad():
        return [
            (model(task.test.images).logits.argmax(1) == task.test.labels).float().mean().item()
            for task in stream.tasks
        ]


def say(name: str, accuracies: list[float]) -> None:
    mean = sum(accuracies) / len(accuracies)
    print(f"{name:<16} {100 * mean:6.2f}   {'  '.join(f'{100 * value:5.1f}' for value in accuracies)}", flush=True)


if __name__ == "__main__":
    main()
