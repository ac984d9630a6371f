import math
from dataclasses import replace

import pytest
import torch

from cl_runner import evaluate
from cl_runner.evaluate import Drift, accuracies
from cl_runner.models.model import PretrainedView
from cl_runner.strategies import Finetune, Independent
from cl_runner.streams.base import Scenario, Task
from tests.toys import learn, toy_model, toy_stream


class Fixed(Finetune):
    """Returns given scores for every image of a task."""

    def predict(self, images, task_ids):
        return self.scores[task_ids]


def fixed(stream, scores):
    strategy = Fixed()
    strategy.setup(toy_model(stream), stream)
    strategy.scores = torch.tensor(scores)
    return strategy


def test_a_mask_is_all_that_tells_task_from_class_incremental():
    stream = toy_stream("task")
    # Every image of task 0 gets class 1's score over class 0's, but class 2's over both.
    strategy = fixed(stream, [[0.0, 1, 2, 0, 0, 0], [0, 0, 1, 0, 9, 0], [0, 0, 0, 0, 1, 0]])
    rows = accuracies(strategy, 2, 7)
    assert rows[Scenario.TASK][:2] == [0.5, 0.5]
    assert rows[Scenario.CLASS][:2] == [0.0, 0.5]  # class 4 is not learned yet: it cannot mislead task 1
    assert accuracies(strategy, 3, 7)[Scenario.CLASS] == [0.0, 0.0, 0.5]


def test_tasks_without_outputs_yet_are_not_measured():
    rows = accuracies(fixed(toy_stream("class"), [[0.0] * 6] * 3), 1, 7)
    assert all(math.isnan(value) for row in rows.values() for value in row[1:])


def test_shared_outputs_are_measured_before_they_are_learned():
    rows = accuracies(fixed(toy_stream("domain"), [[1.0, 0]] * 3), 0, 7)
    assert rows == {Scenario.DOMAIN: [0.5] * 3}


def test_validation_splits_are_looked_at_once_their_task_is_learned():
    stream, looked_at = toy_stream("domain"), []

    def watched(task):
        return Task(task.index, task.classes, lambda split: looked_at.append((split, task.index)) or task.test)

    stream = replace(stream, tasks=[watched(task) for task in stream.tasks])
    (row,) = accuracies(fixed(stream, [[1.0, 0]] * 3), 1, 7, "validation").values()
    assert (row[0], [math.isnan(value) for value in row[1:]]) == (0.5, [True, True])
    assert looked_at == [("validation", 0)]


def test_every_image_counts_once_whatever_the_batch():
    stream = toy_stream("domain", size=25)
    rows = [accuracies(fixed(stream, [[1.0, 0]] * 3), 3, size)[Scenario.DOMAIN] for size in (1, 7, 25, 512)]
    assert rows == [[13 / 25] * 3] * 4


def test_evaluation_leaves_the_weights_and_statistics_alone():
    stream = toy_stream()
    model = toy_model(stream, norm=True)
    strategy = Finetune()
    learn(strategy, stream, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    accuracies(strategy, 3, 5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_drift_is_nothing_before_learning_and_something_after():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    drift = Drift(model, stream, samples=30, batch_size=7)
    assert len(drift.examples) == 30
    assert drift.examples.task_ids.bincount().tolist() == [10, 10, 10]
    assert drift.measure() == {"drift_agreement": 1.0, "drift_kl": pytest.approx(0, abs=1e-12)}
    learn(Finetune(), stream, model, epochs=20)
    assert drift.measure()["drift_kl"] > 0.01


def test_drift_looks_at_every_class_also_where_images_lie_class_by_class():
    stream = toy_stream()
    for task in stream.tasks:
        order = task.test.labels.argsort(stable=True)
        task.__dict__["test"] = task.test[order]
    drift = Drift(toy_model(stream, pretrained=True), stream, samples=30, batch_size=7)
    assert drift.examples.labels.bincount().tolist() == [5] * 6


@pytest.mark.parametrize(("samples", "shares"), [(12, [2, 2, 3, 2, 3]), (3, [0, 1, 0, 1, 1])])
def test_drift_takes_its_images_evenly_from_all_tasks(samples, shares):
    stream = toy_stream(num_tasks=5)
    drift = Drift(toy_model(stream, pretrained=True), stream, samples=samples, batch_size=7)
    assert drift.examples.task_ids.bincount(minlength=5).tolist() == shares


def test_what_needs_to_be_told_the_task_is_not_measured_without():
    stream = toy_stream()
    strategy = Independent()
    learn(strategy, stream, toy_model(stream))
    assert list(accuracies(strategy, 3, 16)) == [Scenario.TASK]


def test_drift_is_the_agreement_and_divergence_under_the_pretrained_head():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    model.eval()
    drift = Drift(model, stream, samples=72, batch_size=72)
    images = torch.cat([task.test.images for task in stream.tasks])
    view = PretrainedView(model)
    p = view(images).logits.detach().double().softmax(1)
    learn(Finetune(), stream, model)
    model.eval()
    q = view(images).logits.detach().double().softmax(1)
    moved = drift.measure()
    assert moved["drift_agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert moved["drift_kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item())


def test_drift_is_computed_where_double_precision_exists(monkeypatch):
    monkeypatch.setattr(evaluate, "float64_device", lambda device: torch.device("meta"))
    stream = toy_stream()
    drift = Drift(toy_model(stream, pretrained=True), stream, samples=6, batch_size=3)
    assert (drift.before.device.type, drift.before.dtype) == ("meta", torch.float64)
