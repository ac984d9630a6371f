"""A strategy's accuracy on the tasks, and its drift from the pretrained model."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from cl_runner.models.model import Model, PretrainedView
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import float64_device
from cl_runner.streams.base import Examples, Scenario, Stream, Task, concatenate


def measured_scenarios(strategy: Strategy) -> tuple[Scenario, ...]:
    """The scenarios that one run can measure: task and class differ only in a mask over the outputs."""
    if strategy.stream.scenario is Scenario.DOMAIN:
        return (Scenario.DOMAIN,)
    return (Scenario.TASK,) if strategy.needs_task_id else (Scenario.TASK, Scenario.CLASS)


@torch.inference_mode()
def accuracies(
    strategy: Strategy, learned: int, batch_size: int, split: str = "test", ahead: bool = True
) -> dict[Scenario, list[float]]:
    """Accuracy on each task after the first `learned` tasks: scenario -> [T].

    NaN if a task's outputs do not exist yet (its classes have not been learned, unless all tasks share them), and on
    the validation split of a future task, which is not available yet. `ahead`: also on the test splits of future tasks,
    if all tasks share their outputs.
    """
    stream = strategy.stream
    rows = {scenario: [math.nan] * len(stream) for scenario in measured_scenarios(strategy)}
    strategy.model.eval()
    ahead = ahead and split == "test" and Scenario.DOMAIN in rows
    for task in stream.tasks if ahead else stream.tasks[:learned]:
        examples = getattr(task, split)
        if len(examples):
            allowed = {scenario: competing(stream, scenario, task, learned) for scenario in rows}
            for scenario, value in _accuracy(strategy, examples, allowed, batch_size).items():
                rows[scenario][task.index] = value
    return rows


def competing(stream: Stream, scenario: Scenario, task: Task, learned: int) -> list[int]:
    """The outputs that compete for an example of `task`."""
    if scenario is Scenario.CLASS:
        return stream.classes_before(learned)
    return list(task.classes)


def _accuracy(
    strategy: Strategy, examples: Examples, allowed: dict[Scenario, list[int]], batch_size: int
) -> dict[Scenario, float]:
    device = strategy.model.device
    hits = {scenario: torch.zeros((), dtype=torch.int64, device=device) for scenario in allowed}
    for batch in examples.batches(batch_size):
        batch = batch.to(device)
        scores = strategy.predict(batch.images, batch.task_ids)
        for scenario, outputs in allowed.items():
            labels = torch.tensor(outputs, device=device)
            hits[scenario] += (labels[scores[:, outputs].argmax(1)] == batch.labels).sum()
    return {scenario: count.item() / len(examples) for scenario, count in hits.items()}


def _evenly(examples: Examples, count: int) -> Examples:
    """Up to `count` evenly spaced rows, since examples may be sorted by class."""
    count = min(count, len(examples))
    return examples[torch.arange(count, device=examples.labels.device) * len(examples) // max(count, 1)]


class Drift:
    """How far the backbone has moved, by the pretrained head's outputs for held-out images, then and now.

    Methods that keep weights for each task (independent, ease, lora with merge=false) are measured with the last one's.
    """

    def __init__(self, model: Model, stream: Stream, samples: int, batch_size: int) -> None:
        """Record the outputs of `model` for up to `samples` test images, evenly from all tasks."""
        self.batch_size = batch_size
        self.view = PretrainedView(model)
        ends = [samples * number // len(stream) for number in range(len(stream) + 1)]
        shares = [end - start for start, end in pairwise(ends)]
        tests = [_evenly(task.test, share) for task, share in zip(stream.tasks, shares, strict=True)]
        self.examples = concatenate(tests)
        self.before = self._log_probabilities()

    def measure(self) -> dict[str, float]:
        """drift_agreement: share of images whose prediction is still the pretrained model's; drift_kl: mean
        KL(pretrained || now), in nats."""
        now = self._log_probabilities()
        same = (now.argmax(1) == self.before.argmax(1)).double().mean()
        divergence = (self.before.exp() * (self.before - now)).sum(1).mean()
        return {"drift_agreement": same.item(), "drift_kl": divergence.item()}

    @torch.no_grad()
    def _log_probabilities(self) -> Tensor:
        self.view.eval()
        device, place = self.view.device, float64_device(self.view.device)
        outputs = [self.view(batch.to(device).images).logits for batch in self.examples.batches(self.batch_size)]
        return torch.cat([logits.to(place).double().log_softmax(1) for logits in outputs])
