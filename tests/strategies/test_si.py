import pytest
import torch
import torch.nn.functional as F

from cl_runner.strategies import SI, Finetune
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream, toy_training

SCENARIOS = ["task", "domain", "class"]


def loss_of(strategy, examples):
    return strategy.task_loss(examples, strategy.model(examples.images)).item()


def flat(values):
    return torch.cat([value.detach().flatten() for _, value in sorted(values.items())])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_path_integral_sums_to_the_fall_of_the_loss_for_small_steps(scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy, task = SI(strength=1.0), stream.tasks[0]
    strategy.setup(model, stream)
    model.reveal(task)
    strategy.before_task(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = loss_of(strategy, task.train)
    for _ in range(200):
        optimizer.zero_grad()
        output = model(task.train.images)
        strategy.task_loss(task.train, output).backward()
        strategy.after_backward()
        optimizer.step()
        strategy.after_step(task.train, output)
    fall = before - loss_of(strategy, task.train)
    assert fall > 0.2 * before
    assert sum(values.sum() for values in strategy.path.values()).item() == pytest.approx(fall, rel=0.01)


def test_the_importance_is_the_path_over_the_squared_distance_and_damping_summed_over_tasks():
    stream = toy_stream("domain")
    model = toy_model(stream)
    strategy = SI(strength=0.0, epsilon=0.3)
    by_hand = {}

    class Watched(type(strategy)):
        def after_task(self, task):
            for name, value in self.model.named_parameters():
                gone = value.detach() - self.start[name]
                by_hand[name] = by_hand.get(name, 0) + self.path[name] / (gone**2 + 0.3)
            super().after_task(task)

    strategy.__class__ = Watched
    learn(strategy, stream, model, tasks=2)
    for name, values in strategy.importance.values.items():
        torch.testing.assert_close(values, by_hand[name])
    assert all(torch.equal(strategy.penalty.terms[0].anchor[name], value) for name, value in model.named_parameters())


def by_the_papers_algorithm(stream, model, strength, epsilon, steps):
    """SI in a bare loop of whole batches, its penalty by autograd."""
    weights = dict(model.named_parameters())
    importance = {name: torch.zeros_like(value) for name, value in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    model.reveal(stream.tasks[0])
    for task in stream.tasks:
        start = {name: value.detach().clone() for name, value in weights.items()}
        path = {name: torch.zeros_like(value) for name, value in weights.items()}
        for _ in range(steps):
            before = {name: value.detach().clone() for name, value in weights.items()}
            pulls = [(importance[name] * (value - start[name]) ** 2).sum() for name, value in weights.items()]
            loss = F.cross_entropy(model(task.train.images).logits, task.train.labels) + strength * sum(pulls)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in weights.items():
                path[name] -= value.grad * (value.detach() - before[name])
        for name, value in weights.items():
            importance[name] += path[name] / ((value.detach() - start[name]) ** 2 + epsilon)
    return weights


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_a_run_goes_as_a_bare_loop_of_the_algorithm_does(scenario):
    stream = toy_stream(scenario)
    ran, expected = (toy_model(stream, active_logits="all").double() for _ in range(2))
    learn(SI(strength=2.0, epsilon=0.1), stream, ran, epochs=20, batch_size=len(stream.tasks[0].train))
    free = toy_model(stream, active_logits="all").double()
    learn(Finetune(), stream, free, epochs=20, batch_size=len(stream.tasks[0].train))
    for name, values in by_the_papers_algorithm(stream, expected, strength=2.0, epsilon=0.1, steps=20).items():
        torch.testing.assert_close(ran.get_parameter(name), values)
    assert not torch.allclose(ran.head.weight, free.head.weight, rtol=0.01)  # the penalty tells


def test_the_average_counts_each_class_once():
    sums = {}
    for accumulation in ("sum", "average"):
        stream = toy_stream("domain")
        strategy = SI(strength=0.0, accumulation=accumulation)
        learn(strategy, stream, toy_model(stream))
        sums[accumulation] = flat(strategy.importance.values)
    torch.testing.assert_close(sums["average"], sums["sum"] / 3)


def test_the_penalty_is_strength_times_importance_times_squared_distance():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = SI(strength=3.0)
    learn(strategy, stream, model, tasks=1)
    batch = stream.tasks[0].train
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    expected = 3 * 0.1**2 * flat(strategy.importance.values).sum()
    found = strategy.penalties(batch, model(batch.images))["si"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def learned_path(gradient, clip_norm=None):
    """Of a second task that SI's penalty pulls at."""
    stream = toy_stream("domain")
    strategy = SI(strength=20.0, gradient=gradient)
    learn(strategy, stream, toy_model(stream), tasks=2, clip_norm=clip_norm)
    return strategy


def test_the_unregularised_gradient_leaves_out_sis_own_penalty():
    class ByAutograd(SI):
        """The path of the task's loss alone."""

        def after_backward(self):
            super().after_backward()
            live = dict(self.model.named_parameters())
            loss = self.task_loss(self.batch, self.model(self.batch.images))
            self._slopes = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))

        def before_batch(self, batch):
            self.batch = batch
            return batch

    stream = toy_stream("domain")
    slow = ByAutograd(strength=20.0)
    learn(slow, stream, toy_model(stream), tasks=2)
    total, task = learned_path("total"), learned_path("task")
    torch.testing.assert_close(flat(task.path), flat(slow.path), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(flat(total.path), flat(task.path), rtol=1e-2)


def test_the_path_takes_the_gradient_as_it_was_before_it_was_clipped():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = SI(strength=1.0)
    training, _ = toy_training(strategy, stream, model, clip_norm=1e-3, epochs=1, batch_size=24)
    task = stream.tasks[0]
    model.reveal(task)
    strategy.before_task(task)
    live = dict(model.named_parameters())
    slopes = torch.autograd.grad(strategy.task_loss(task.train, model(task.train.images)), list(live.values()))
    before = [value.detach().clone() for value in live.values()]
    training.learn(task, strategy.training_data(task))
    by_hand = [slope * (was - now) for slope, was, now in zip(slopes, before, live.values(), strict=True)]
    for found, expected in zip(strategy.path.values(), by_hand, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("negative", "expected"), [("keep", [2.0, -4.0, -2.0]), ("drop", [2.0, 0.0, 2.0])])
def test_importance_of_weights_that_made_the_losses_rise_is_kept_or_dropped(negative, expected):
    stream = toy_stream()
    model = toy_model(stream)
    strategy = SI(strength=1.0, negative=negative, epsilon=0.5)
    strategy.setup(model, stream)
    model.reveal(stream.tasks[0])
    found = []
    for path in (1, -3, 1):  # sums: 1, -2 or 0, -1 or 1
        strategy.before_task(stream.tasks[0])
        strategy.path["backbone.1.bias"] += path
        strategy.after_task(stream.tasks[0])  # nothing has moved: the path is divided by epsilon alone
        found += strategy.importance.values["backbone.1.bias"].unique().tolist()
    assert found == expected


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_no_row_that_was_not_revealed_is_held(scenario):
    stream = toy_stream(scenario)
    strategy = SI(strength=1.0)
    learn(strategy, stream, toy_model(stream), tasks=2)
    weight = strategy.importance.values["head.weight"]
    assert weight[:4].any(1).all()
    assert not weight[4:].any()


def test_without_the_head_only_the_backbone_is_held():
    stream = toy_stream()
    strategy = SI(strength=1.0, head=False)
    learn(strategy, stream, toy_model(stream), tasks=2)
    assert all(name.startswith("backbone.") for name in strategy.importance.values)
    assert strategy.importance.values


def test_it_forgets_less_than_fine_tuning():
    losses = {}
    for kind in (Finetune, lambda: SI(strength=3.0)):
        stream = toy_stream("domain")
        strategy = kind()
        learn(strategy, stream, toy_model(stream), epochs=15)
        losses[type(strategy)] = loss_of(strategy, stream.tasks[0].train)
    assert losses[SI] < 0.7 * losses[Finetune]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario):
    assert_resumes(lambda: SI(strength=5.0, gradient="task"), scenario, norm=True)
