"""How well a strategy does on the tasks, and how far it has moved from the pretrained model."""

import math

import torch
from torch import Tensor

from cl_runner.models.model import Model, PretrainedView
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Scenario, Stream, Task, concatenate


def measured_scenarios(strategy: Strategy) -> tuple[Scenario, ...]:
    """The scenarios that one run's outputs answer for: a mask is all that tells task from class apart."""
    if strategy.stream.scenario is Scenario.DOMAIN:
        return (Scenario.DOMAIN,)
    return (Scenario.TASK,) if strategy.needs_task_id else (Scenario.TASK, Scenario.CLASS)


@torch.inference_mode()
def accuracies(strategy: Strategy, learned: int, batch_size: int, split: str = "test") -> dict[Scenario, list[float]]:
    """Share of right answers on each task once the first `learned` tasks are: scenario -> [T].

    NaN where a task's outputs do not exist yet (its classes are not learned, unless all tasks share them), and on the
    validation split of a task that is not learned: nobody has it yet.
    """
    stream = strategy.stream
    rows = {scenario: [math.nan] * len(stream) for scenario in measured_scenarios(strategy)}
    strategy.model.eval()
    ahead = split == "test" and Scenario.DOMAIN in rows
    for task in stream.tasks if ahead else stream.tasks[:learned]:
        examples = getattr(task, split)
        if len(examples):
            allowed = {scenario: _allowed(stream, scenario, task, learned) for scenario in rows}
            for scenario, value in _accuracy(strategy, examples, allowed, batch_size).items():
                rows[scenario][task.index] = value
    return rows


def _allowed(stream: Stream, scenario: Scenario, task: Task, learned: int) -> list[int]:
    """The outputs that an example of `task` is told apart by."""
    if scenario is Scenario.CLASS:
        return sorted({label for earlier in stream.tasks[:learned] for label in earlier.classes})
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
    """Up to `count` rows from all over the examples, which may lie class by class."""
    count = min(count, len(examples))
    return examples[torch.arange(count, device=examples.labels.device) * len(examples) // max(count, 1)]


class Drift:
    """How far the backbone has moved: the pretrained head's answers on held-out images, then and now."""

    def __init__(self, model: Model, stream: Stream, samples: int, batch_size: int) -> None:
        """Remembers the answers of `model` as it now is, on up to `samples` test images, evenly from all tasks."""
        self.batch_size = batch_size
        self.view = PretrainedView(model)
        share = -(-samples // len(stream))
        self.examples = concatenate([_evenly(task.test, share) for task in stream.tasks])[:samples]
        self.before = self._log_probabilities()

    def measure(self) -> dict[str, float]:
        """drift_agreement: share of images whose top answer is still the pretrained model's; drift_kl: mean
        KL(pretrained || now), in nats."""
        now = self._log_probabilities()
        same = (now.argmax(1) == self.before.argmax(1)).double().mean()
        divergence = (self.before.exp() * (self.before - now)).sum(1).mean()
        return {"drift_agreement": same.item(), "drift_kl": divergence.item()}

    @torch.no_grad()
    def _log_probabilities(self) -> Tensor:
        self.view.eval()
        device = self.view.device
        batches = self.examples.batches(self.batch_size)
        return torch.cat([self.view(batch.to(device).images).logits.double().log_softmax(1) for batch in batches])
