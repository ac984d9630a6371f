from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.memory import Reservoir
from cl_runner.strategies import MIR
from tests.toys import learn, toy_model, toy_stream


def standing(norm=False, **settings):
    stream = toy_stream("class")
    model = toy_model(stream, norm=norm)
    strategy = MIR(memory=Reservoir(size=40), **settings)
    learn(strategy, stream, model, tasks=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    return strategy, model, stream.tasks[1].train[:8]


def losses(model, rows):
    return F.cross_entropy(
        model.restrict(model(rows.images).logits, rows.task_ids), rows.labels, reduction="none"
    ).detach()


def test_it_replays_the_rows_that_a_step_on_the_fresh_ones_would_harm_most():
    strategy, model, fresh = standing(candidates=40, replay_batch_size=6, virtual_lr=0.5)
    ahead = deepcopy(model)
    F.cross_entropy(ahead.restrict(ahead(fresh.images).logits, fresh.task_ids), fresh.labels).backward()
    torch.optim.SGD(ahead.parameters(), lr=0.5).step()
    held = strategy.memory.examples
    harm = losses(ahead, held) - losses(model, held)
    worst = harm.topk(6).values
    replayed = strategy.before_batch(fresh)[8:]
    found = losses(ahead, replayed) - losses(model, replayed)
    torch.testing.assert_close(found.sort().values, worst.sort().values)
    assert harm.mean() < worst.min()


def test_it_chooses_among_the_candidates_drawn():
    strategy, _, fresh = standing(candidates=5, replay_batch_size=None)
    assert len(strategy.before_batch(fresh)) == 8 + 5


def test_no_choice_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.candidates: expected more than replay_batch_size=5, .* got 5"):
        MIR(memory=Reservoir(size=40), candidates=5, replay_batch_size=5)


def test_trying_the_step_changes_neither_weights_nor_statistics_nor_gradients():
    strategy, model, fresh = standing(norm=True)
    model.train()
    model.zero_grad()
    before = deepcopy(model.state_dict())
    strategy.before_batch(fresh)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_leaves_most_candidates_unless_told_otherwise_however_large_the_batch():
    strategy, _, _ = standing()
    fresh = strategy.stream.tasks[1].train
    assert len(fresh) == 24
    assert len(strategy.before_batch(fresh)) == 24 + 10
