import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.memory import Reservoir
from cl_runner.models.mlp import MLP
from cl_runner.strategies import ERACE
from cl_runner.streams.split import Split
from tests.toys import learn, toy_model, toy_stream


def in_second_task(strategy):
    stream = toy_stream("class")
    model = toy_model(stream)
    learn(strategy, stream, model, tasks=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    model.zero_grad()
    return stream.tasks[1].train, model


def test_fresh_rows_are_told_apart_by_their_batchs_classes_and_replayed_ones_by_all():
    strategy = ERACE(memory=Reservoir(size=30), replay_batch_size=5)
    data, model = in_second_task(strategy)
    batch = strategy.before_batch(data[:8])
    logits = model(batch.images).logits
    fresh = F.cross_entropy(logits[:8, 2:4], batch.labels[:8] - 2)
    replayed = F.cross_entropy(logits[8:, :4], batch.labels[8:])
    torch.testing.assert_close(strategy.task_loss(batch, model(batch.images)), fresh + replayed)


def test_fresh_rows_push_no_other_class_away():
    strategy = ERACE(memory=Reservoir(size=30))
    data, model = in_second_task(strategy)
    strategy.memory = Reservoir(size=30)  # nothing to replay
    batch = strategy.before_batch(data[:8])
    strategy.task_loss(batch, model(batch.images)).backward()
    assert (model.head.weight.grad[:2] == 0).all()
    assert (model.head.weight.grad[2:4] != 0).any(1).all()


def test_a_class_that_is_not_in_the_batch_is_left_alone_though_the_task_has_it():
    strategy = ERACE(memory=Reservoir(size=30))
    data, model = in_second_task(strategy)
    strategy.memory = Reservoir(size=30)
    batch = strategy.before_batch(data[data.labels == 2][:4])
    strategy.task_loss(batch, model(batch.images)).backward()
    assert (model.head.weight.grad[3] == 0).all()


def test_tasks_of_single_classes_are_refused_since_nothing_would_be_learned_from_fresh_rows():
    single, model = Split(name="digits", num_tasks=10, scenario="class"), MLP(widths=[8])
    with pytest.raises(ConfigError, match=r"strategy: expected tasks of several classes .* got one class each"):
        ERACE(memory=Reservoir()).check(single, model)
    ERACE(memory=Reservoir()).check(Split(name="digits", num_tasks=5, scenario="class"), model)
