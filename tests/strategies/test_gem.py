from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cl_runner.memory import ClassBalanced
from cl_runner.strategies import GEM, gem
from cl_runner.strategies.gem import project
from tests.toys import learn, toy_model, toy_stream


def nearest_by_trying(gradient, constraints):
    """By brute force over active sets: the nearest vector that satisfies all constraints."""
    rows, wanted = torch.nn.functional.normalize(constraints.double()).numpy(), gradient.double().numpy()
    subsets = chain.from_iterable(combinations(range(len(rows)), size) for size in range(len(rows) + 1))
    best, found = np.inf, wanted
    for subset in subsets:
        active = rows[list(subset)]
        candidate = wanted - active.T @ np.linalg.pinv(active.T) @ wanted if len(active) else wanted
        if (rows @ candidate).min() > -1e-9 * np.linalg.norm(wanted) and np.linalg.norm(candidate - wanted) < best:
            best, found = np.linalg.norm(candidate - wanted), candidate
    return torch.from_numpy(found).to(gradient)


def drawn(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    gradient, constraints = torch.randn(12, generator=generator), torch.randn(4, 12, generator=generator)
    if kind == "alike":  # as the gradients of tasks often are
        constraints = constraints[:1] + 0.01 * constraints
    elif kind == "the same":
        constraints[2] = 3 * constraints[0]
    elif kind == "small":
        gradient, constraints = 1e-8 * gradient, 1e-6 * constraints
    return (-gradient if gradient @ constraints[0] > 0 else gradient), constraints


@pytest.mark.parametrize("kind", ["any", "alike", "the same", "small"])
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_satisfies_all_constraints_and_is_the_nearest_that_does(seed, kind):
    gradient, constraints = drawn(seed, kind)
    found = project(gradient, constraints)
    scale = gradient.norm() * constraints.norm(dim=1)
    assert (constraints @ gradient).min() < 0
    assert (constraints @ found >= -1e-5 * scale).all()
    torch.testing.assert_close(found, nearest_by_trying(gradient, constraints), rtol=1e-3, atol=1e-4 * gradient.norm())


def test_a_gradient_that_satisfies_all_constraints_is_left_alone():
    gradient, constraints = drawn(0, "any")
    constraints = constraints * (constraints @ gradient).sign()[:, None]
    assert torch.equal(project(gradient, constraints, margin=0.5), gradient)


def test_the_margin_adds_the_constraints():
    gradient, constraints = drawn(1, "any")
    expected = project(gradient, constraints) + 0.5 * constraints.sum(0)
    torch.testing.assert_close(project(gradient, constraints, margin=0.5), expected)


def test_opposite_constraints_leave_only_what_is_at_right_angles_to_them():
    constraints = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(project(torch.tensor([3.0, 2.0]), constraints), torch.tensor([0.0, 2.0]))


def test_a_gradient_that_is_not_finite_is_left_for_the_trainer_to_report():
    gradient, constraints = drawn(0, "any")
    gradient[3] = torch.nan
    assert project(gradient, constraints).isnan().any()


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_a_step_in_the_third_task_increases_no_earlier_tasks_loss_to_first_order(scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = GEM(memory=ClassBalanced(size=5, per="task"), margin=0.0)
    learn(strategy, stream, model, tasks=2, epochs=1)
    model.reveal(stream.tasks[2])
    strategy.before_task(stream.tasks[2])
    earlier = stream.tasks[1].train[:8]
    fresh = replace(earlier, labels=earlier.labels.max() + earlier.labels.min() - earlier.labels)
    batch = strategy.before_batch(fresh)
    model.zero_grad()
    strategy.task_loss(batch, model(batch.images)).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    strategy.after_backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    held = strategy.memory.examples
    products = []
    for task in (0, 1):
        rows = held[held.task_ids == task]
        assert len(rows) == 5
        loss = F.cross_entropy(model.restrict(model(rows.images).logits, rows.task_ids), rows.labels)
        constraint = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert constraint @ found >= -1e-5 * constraint.norm() * found.norm()
        products.append(constraint @ plain)
    assert min(products) < 0


def test_a_tasks_gradient_is_computed_in_pieces_no_larger_than_the_batch():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = GEM(memory=ClassBalanced(size=20, per="task"))
    learn(strategy, stream, model, tasks=1, epochs=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    held = strategy.memory.examples
    loss = F.cross_entropy(model.restrict(model(held.images).logits, held.task_ids), held.labels)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    sizes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    strategy.before_batch(stream.tasks[1].train[:8])
    for found, expected in zip(strategy.gradient(held), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert sum(sizes) == 20
    assert max(sizes) <= 8


def test_products_are_taken_where_double_precision_exists(monkeypatch):
    asked = []
    monkeypatch.setattr(gem, "float64_device", lambda device: asked.append(device) or device)
    project(*drawn(0, "any"))
    assert asked == [torch.device("cpu")]
