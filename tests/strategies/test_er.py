import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.memory import ClassBalanced, Reservoir
from cl_runner.strategies import ER
from tests.toys import learn, toy_model, toy_stream


def in_third_task(strategy):
    stream = toy_stream()
    model = toy_model(stream)
    learn(strategy, stream, model, tasks=2)
    model.reveal(stream.tasks[2])
    strategy.before_task(stream.tasks[2])
    return stream.tasks[2], model


def cross_entropy(model, rows):
    return F.cross_entropy(model.restrict(model(rows.images).logits, rows.task_ids), rows.labels)


def test_concatenated_rows_all_count_the_same():
    strategy = ER(memory=Reservoir(size=30), replay_batch_size=5)
    task, model = in_third_task(strategy)
    batch = strategy.before_batch(task.train[:8])
    by_hand = (8 * cross_entropy(model, batch[:8]) + 5 * cross_entropy(model, batch[8:])) / 13
    torch.testing.assert_close(strategy.task_loss(batch, model(batch.images)), by_hand)


def test_weighted_losses_count_a_kth_and_the_rest_in_task_k():
    strategy = ER(memory=ClassBalanced(size=5, per="class"), replay_batch_size=5, mode="weighted", store="task")
    task, model = in_third_task(strategy)
    batch = strategy.before_batch(task.train[:8])
    by_hand = cross_entropy(model, batch[:8]) / 3 + 2 / 3 * cross_entropy(model, batch[8:])
    torch.testing.assert_close(strategy.task_loss(batch, model(batch.images)), by_hand)


def test_nothing_weighs_on_the_first_task():
    stream = toy_stream()
    strategy = ER(memory=Reservoir(size=30), mode="weighted")
    strategy.setup(toy_model(stream), stream)
    strategy.before_task(stream.tasks[0])
    strategy.memory.add(stream.tasks[0].train)
    assert len(strategy.before_batch(stream.tasks[0].train[:8])) == 8


def test_an_oversampled_memory_makes_half_of_the_tasks_data():
    strategy = ER(memory=ClassBalanced(size=10), mode="oversampled", store="task")
    task, _ = in_third_task(strategy)
    data = strategy.training_data(task)
    assert torch.bincount(data.task_ids).tolist()[2] == 24
    assert len(data) == 48
    held = strategy.memory.examples
    counts = [(data.images[24:] == image).flatten(1).all(1).sum() for image in held.images]
    assert sum(counts) == 24
    assert max(counts) - min(counts) <= 1
    assert len(strategy.before_batch(data[:8])) == 8  # nothing is replayed beside


def test_a_memory_larger_than_the_tasks_data_is_learned_whole():
    strategy = ER(memory=ClassBalanced(size=40), mode="oversampled", store="task")
    task, _ = in_third_task(strategy)
    assert len(strategy.training_data(task)) == 24 + 40


def test_the_first_tasks_data_is_its_own():
    strategy = ER(memory=Reservoir(size=10), mode="oversampled", store="task")
    stream = toy_stream()
    strategy.setup(toy_model(stream), stream)
    assert len(strategy.training_data(stream.tasks[0])) == 24


def test_an_oversampled_memory_changes_between_tasks_only():
    with pytest.raises(ConfigError, match=r"strategy\.store: expected task with mode=oversampled, got 'step'"):
        ER(memory=Reservoir(), mode="oversampled")
    with pytest.raises(ConfigError, match=r"strategy\.replay_batch_size: expected null with mode=oversampled, got 8"):
        ER(memory=Reservoir(), mode="oversampled", store="task", replay_batch_size=8)


def test_which_rows_are_repeated_once_more_is_drawn_anew():
    strategy = ER(memory=ClassBalanced(size=16), mode="oversampled", store="task")
    task, _ = in_third_task(strategy)
    twice = set()
    for seed in range(20):
        torch.manual_seed(seed)
        rows = strategy.training_data(task).images[24:]  # 16 rows, 8 of them again
        found, counts = rows.flatten(1).unique(dim=0, return_counts=True)
        assert sorted(counts.tolist()) == [1] * 8 + [2] * 8
        twice |= {tuple(row.tolist()) for row in found[counts == 2]}
    assert len(twice) == 16
