import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.fisher.batched import Batched
from cl_runner.fisher.estimators import Empirical, Exact, Probe
from cl_runner.strategies import Finetune, RWalk
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream

SCENARIOS = ["task", "domain", "class"]


class Watched(RWalk):
    """Keeps what every step saw."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.fishers, self.paths, self.starts, self.averages = [], [], [], []

    def before_batch(self, batch):
        if self.steps % self.interval == 0:
            self.fishers.append(self.fisher(self.model, batch).values)
            self.starts.append({name: value.detach().clone() for name, value in self.model.named_parameters()})
            self.paths.append({name: torch.zeros_like(value) for name, value in self.starts[-1].items()})
            self.averages.append({})
        found = super().before_batch(batch)
        self.averages[-1] = self.average.values
        return found

    def after_backward(self):
        super().after_backward()
        self.was = {name: (value.detach().clone(), value.grad.clone()) for name, value in self.model.named_parameters()}

    def after_step(self, batch, output):
        for name, value in self.model.named_parameters():
            before, gradient = self.was[name]
            self.paths[-1][name] += gradient * (before - value.detach())
        super().after_step(batch, output)


def watched(tasks=1, **settings):
    stream = toy_stream("domain")
    model = toy_model(stream)
    strategy = Watched(**{"fisher": Exact(num_samples=None), "strength": 1.0, "interval": 3, **settings})
    learn(strategy, stream, model, tasks=tasks)
    return strategy


def test_the_fisher_is_a_moving_average_over_training_across_tasks():
    strategy = watched(tasks=2, alpha=0.3)
    assert len(strategy.fishers) == 8  # 12 steps a task, one in three
    for name, found in strategy.average.values.items():
        by_hand = strategy.fishers[0][name]
        for fisher in strategy.fishers[1:]:
            by_hand = 0.3 * fisher[name] + 0.7 * by_hand
        torch.testing.assert_close(found, by_hand)


def test_the_score_is_the_fall_of_the_loss_for_each_unit_of_divergence():
    strategy = watched(epsilon=1e-5)  # four intervals of three steps
    starts = [*strategy.starts, {name: value.detach() for name, value in strategy.model.named_parameters()}]
    for name, found in strategy.past.values.items():
        by_hand = torch.zeros_like(found)
        for number, path in enumerate(strategy.paths):
            moved = starts[number + 1][name] - starts[number][name]
            by_hand += path[name].clamp(min=0) / (strategy.averages[number][name] * moved**2 / 2 + 1e-5)
        torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)


def test_the_score_leaves_out_the_gradient_of_its_own_penalty():
    stream = toy_stream("domain")
    model = toy_model(stream)
    strategy = RWalk(fisher=Exact(), strength=1.0, interval=100)
    learn(strategy, stream, model, tasks=1)
    strategy.before_task(stream.tasks[1])
    batch = strategy.before_batch(stream.tasks[1].train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    output = model(batch.images)
    loss = strategy.task_loss(batch, output)
    names, parameters = zip(*model.named_parameters(), strict=True)
    slopes = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    model.zero_grad()
    (loss + strategy.penalties(batch, output)["rwalk"]).backward()
    strategy.after_backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.5
    strategy.after_step(batch, output)
    for name, path in strategy.path.items():
        torch.testing.assert_close(path, 0.5 * slopes[name], rtol=1e-4, atol=1e-6)


def test_without_the_head_the_importances_of_the_rest_are_scaled_to_one_each():
    stream = toy_stream("domain")
    strategy = RWalk(fisher=Exact(), strength=1.0, head=False)
    learn(strategy, stream, toy_model(stream), tasks=1)
    parts = [strategy.anchored_part(part) for part in (strategy.average, strategy.past)]
    assert all("head.weight" not in part.values for part in parts)
    for name, found in strategy.importance.values.items():
        largest = [max(values.max() for values in part.values.values()) for part in parts]
        by_hand = sum(part.values[name] / most for part, most in zip(parts, largest, strict=True))
        torch.testing.assert_close(found, by_hand)


def test_the_importance_is_the_fisher_plus_the_score_each_with_one_for_its_largest():
    strategy = watched()
    largest = {
        part: max(values.max() for values in getattr(strategy, part).values.values()) for part in ("average", "past")
    }
    for name, found in strategy.importance.values.items():
        by_hand = strategy.average.values[name] / largest["average"] + strategy.past.values[name] / largest["past"]
        torch.testing.assert_close(found, by_hand)


def test_scores_are_averaged_with_those_of_earlier_tasks():
    stream = toy_stream("domain")
    strategy = RWalk(fisher=Exact(), strength=0.0)
    pasts, scores = [], []

    class Kept(RWalk):
        def after_task(self, task):
            super().after_task(task)
            pasts.append(self.past.values)
            scores.append({name: values.clamp(min=0) for name, values in self.score.values.items()})

    strategy.__class__ = Kept
    learn(strategy, stream, toy_model(stream), tasks=2)
    for name, found in pasts[1].items():
        torch.testing.assert_close(found, (scores[0][name] + scores[1][name]) / 2)


def test_a_negative_score_counts_as_none():
    stream = toy_stream("domain")
    strategy = RWalk(fisher=Exact(), strength=1.0)
    learn(strategy, stream, toy_model(stream), tasks=1)
    strategy.before_task(stream.tasks[1])
    strategy.path["backbone.1.bias"] -= 1
    strategy.past = strategy.past.scaled(0)
    strategy.after_task(stream.tasks[1])
    assert not strategy.past.values["backbone.1.bias"].any()


def test_the_noise_of_the_fisher_is_another_in_every_batch():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = RWalk(fisher=Probe(), strength=1.0, alpha=1.0, interval=1)
    strategy.setup(model, stream)
    model.reveal(stream.tasks[0])
    found = []
    for _ in range(2):
        strategy.before_task(stream.tasks[0])
        strategy.before_batch(stream.tasks[0].train[:4])
        found.append(strategy.average.values["backbone.1.weight"])
    assert not torch.equal(*found)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_no_row_that_was_not_revealed_is_held(scenario):
    stream = toy_stream(scenario)
    strategy = RWalk(fisher=Probe(logits="all"), strength=1.0)
    learn(strategy, stream, toy_model(stream), tasks=2)
    weight = strategy.importance.values["head.weight"]
    assert weight[:4].any(1).all()
    assert not weight[4:].any()


def test_it_forgets_less_than_fine_tuning():
    losses = {}
    for kind in (Finetune, lambda: RWalk(fisher=Exact(), strength=2.0)):
        stream = toy_stream("domain")
        strategy = kind()
        learn(strategy, stream, toy_model(stream), epochs=15)
        first = stream.tasks[0].train
        losses[type(strategy)] = strategy.task_loss(first, strategy.model(first.images)).item()
    assert losses[RWalk] < 0.7 * losses[Finetune]


@pytest.mark.parametrize("fisher", [Empirical(), Batched(batch_size=8), Probe(num_samples=4)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario, fisher):
    assert_resumes(lambda: RWalk(fisher=fisher, strength=1.0, interval=3), scenario, norm=True)


def test_only_a_diagonal_will_do():
    with pytest.raises(ConfigError, match=r"fisher\.representation: expected diagonal for rwalk"):
        RWalk(fisher=Probe(representation="ekfac"))
