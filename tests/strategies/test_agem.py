from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cl_runner.memory import ClassBalanced
from cl_runner.strategies import AGEM
from tests.toys import learn, toy_model, toy_stream


def standing(scenario="domain", seed=0):
    """A strategy at the beginning of its second task, and its model."""
    stream = toy_stream(scenario, seed=seed)
    model = toy_model(stream, seed=seed)
    strategy = AGEM(memory=ClassBalanced(size=24))
    learn(strategy, stream, model, tasks=1, epochs=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    return strategy, model, stream


def loss_on(model, rows):
    return F.cross_entropy(model.restrict(model(rows.images).logits, rows.task_ids), rows.labels)


def gradient(model, rows):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_on(model, rows), list(model.parameters()))])


def step_on(strategy, model, fresh):
    """The gradient that the optimizer gets, and the one that it would get from fine-tuning."""
    batch = strategy.before_batch(fresh)
    model.zero_grad()
    strategy.task_loss(batch, model(batch.images)).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    strategy.after_backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), plain


def contradicting(rows, scenario="domain"):
    """The rows with the labels of others."""
    return replace(rows, labels=rows.labels + 2 if scenario == "class" else 1 - rows.labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_no_step_increases_the_reference_loss_to_first_order(scenario, seed):
    strategy, model, stream = standing(scenario, seed)
    fresh = contradicting(stream.tasks[0].train[:8], scenario) if seed < 3 else stream.tasks[1].train[:8]
    found, plain = step_on(strategy, model, fresh)
    reference = gradient(model, strategy.reference)
    assert found @ reference >= -1e-5 * found.norm() * reference.norm()
    if seed < 3:
        assert plain @ reference < 0
    before = loss_on(model, strategy.reference)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()) - 1e-3 * found, model.parameters()
    )
    assert loss_on(model, strategy.reference) <= before + 1e-5


@pytest.mark.parametrize(("size", "rows"), [(None, 8), (5, 5)])
def test_the_reference_has_as_many_rows_as_asked_for(size, rows):
    strategy, _, stream = standing()
    strategy = AGEM(memory=strategy.memory, replay_batch_size=size)
    batch = strategy.before_batch(stream.tasks[1].train[:8])
    assert (len(batch), len(strategy.reference)) == (8, rows)


def test_a_gradient_that_does_no_harm_is_left_alone():
    strategy, model, stream = standing()
    found, plain = step_on(strategy, model, stream.tasks[0].train[:8])
    assert plain @ gradient(model, strategy.reference) > 0
    torch.testing.assert_close(found, plain)


def test_of_a_harmful_gradient_what_is_at_right_angles_to_the_reference_stays():
    strategy, model, stream = standing()
    found, plain = step_on(strategy, model, contradicting(stream.tasks[0].train[:8]))
    reference = gradient(model, strategy.reference)
    by_hand = plain - (plain @ reference) / (reference @ reference) * reference
    torch.testing.assert_close(found, by_hand)


def test_the_batch_itself_is_fresh_and_the_memory_is_filled_at_the_end_of_the_task():
    strategy, _, stream = standing()
    assert (strategy.memory.examples.task_ids == 0).all()
    assert len(strategy.before_batch(stream.tasks[1].train[:8])) == 8
    strategy.after_task(stream.tasks[1])
    assert torch.bincount(strategy.memory.examples.task_ids).min() > 0


def test_the_first_task_is_fine_tuning():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = AGEM(memory=ClassBalanced(size=24))
    strategy.setup(model, stream)
    model.reveal(stream.tasks[0])
    found, plain = step_on(strategy, model, stream.tasks[0].train[:8])
    assert torch.equal(found, plain)
