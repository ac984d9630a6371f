import math

import pytest
import torch
import torch.nn.functional as F

from cl_runner.evaluate import accuracies
from cl_runner.models.cosine import CosineHead
from cl_runner.strategies import SLCA, Finetune
from cl_runner.streams.base import Scenario
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream, toy_training

SCENARIOS = ["task", "domain", "class"]
OPTIMIZERS = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr / 10),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr / 10, weight_decay=0.1),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_learns_in_every_scenario(scenario):
    stream = toy_stream(scenario)
    strategy = SLCA()
    learn(strategy, stream, toy_model(stream), epochs=25)
    rows = accuracies(strategy, 3, 16)
    assert (rows.get(Scenario.TASK) or rows[Scenario.DOMAIN])[-1] >= 0.75


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_backbone_learns_as_with_a_parameter_group_of_a_smaller_rate(name):
    stream = toy_stream("class")
    make, task = OPTIMIZERS[name], stream.tasks[0]
    model, twin = toy_model(stream), toy_model(stream)
    training, _ = toy_training(SLCA(backbone_rate=0.1), stream, model)
    training.make_optimizer = lambda params: make(params, 0.1)
    grouped, _ = toy_training(Finetune(), stream, twin)
    rate = make([torch.zeros(1)], 0.1).defaults["lr"]

    def in_groups(params):
        own = {id(parameter) for parameter in twin.backbone.parameters()}
        slow = [parameter for parameter in params if id(parameter) in own]
        fast = [parameter for parameter in params if id(parameter) not in own]
        return make([{"params": fast}, {"params": slow, "lr": rate / 10}], 0.1)

    grouped.make_optimizer = in_groups
    before = twin.backbone[1].weight.clone()
    for each, of in ((training, model), (grouped, twin)):
        of.reveal(task)
        each.learn(task, task.train)
    assert (twin.backbone[1].weight - before).abs().max() > 1e-4
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_leaves_the_backbone_and_one_is_fine_tuning():
    stream = toy_stream()
    still, free, plain = toy_model(stream), toy_model(stream), toy_model(stream)
    before = still.backbone[1].weight.clone()
    learn(SLCA(backbone_rate=0.0), stream, still)
    assert torch.equal(still.backbone[1].weight, before)
    learn(SLCA(backbone_rate=1.0, epochs=0), stream, free)
    learn(Finetune(), stream, plain)
    assert all(torch.equal(one, other) for one, other in zip(free.parameters(), plain.parameters(), strict=True))


def test_the_alignment_changes_only_the_rows_of_classes_that_have_come():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = SLCA()
    learn(strategy, stream, model, tasks=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy.align()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight", "head.bias"]
    assert (model.head.weight[:4] != before["head.weight"][:4]).any(1).all()
    assert torch.equal(model.head.weight[4:], before["head.weight"][4:])


def test_a_task_goes_on_from_the_head_before_its_alignment_the_scale_of_its_cosines_too():
    stream = toy_stream("class")
    model = toy_model(stream)
    model.head = CosineHead(8, 6, 10.0)
    strategy = SLCA(lr=1.0)
    learn(strategy, stream, model, tasks=2)
    unaligned = {name: value.clone() for name, value in strategy.unaligned.items()}
    with torch.no_grad():
        model.head.scale += 1.0
    model.reveal(stream.tasks[2])
    strategy.before_task(stream.tasks[2])
    assert torch.equal(model.head.scale, unaligned["scale"])
    assert torch.equal(model.head.weight[:4], unaligned["weight"][:4])


def test_the_alignment_brings_back_classes_that_the_head_has_forgotten():
    stream = toy_stream("class")
    accuracy = {}
    for epochs in (0, 5):
        strategy = SLCA(epochs=epochs)
        learn(strategy, stream, toy_model(stream, active_logits="current"), epochs=20)
        accuracy[epochs] = sum(accuracies(strategy, 3, 16)[Scenario.CLASS][:2]) / 2
    assert accuracy[5] > accuracy[0] + 0.2


def test_features_are_drawn_from_each_classs_own_gaussian():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = SLCA(backbone_rate=0.0)  # so that the features are still what they were
    learn(strategy, stream, model, tasks=2)
    torch.manual_seed(0)
    features, labels = strategy.moments.drawn(20_000)
    assert labels.bincount().tolist() == [20_000] * 4
    spreads = []
    for label in range(4):
        examples = stream.tasks[label // 2].train
        own = model.eval()(examples.images[examples.labels == label]).features.detach().double()
        covariance = torch.cov(own.T, correction=0)
        rows, size = features[labels == label], covariance.diagonal().max().sqrt()
        torch.testing.assert_close(rows.mean(0), own.mean(0), rtol=0, atol=0.05 * size)
        torch.testing.assert_close(torch.cov(rows.T), covariance, rtol=0, atol=0.1 * size**2)
        spreads.append(size)
    assert max(spreads) > 1.2 * min(spreads)  # one covariance for all would not do


def test_the_alignments_rate_falls_as_a_cosine(monkeypatch):
    stream = toy_stream("class")
    strategy, rates = SLCA(epochs=4, lr=0.02, samples=8, batch_size=1000), []
    learn(strategy, stream, toy_model(stream), tasks=2)
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    strategy.align()
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])


@pytest.mark.parametrize(("scenario", "outputs"), [("class", [0, 1, 2, 3]), ("task", [2, 3])])
def test_the_alignment_loss_is_cross_entropy_of_logits_of_one_length_over_those_that_count(scenario, outputs):
    stream = toy_stream(scenario)
    strategy = SLCA(temperature=0.2)
    learn(strategy, stream, toy_model(stream), tasks=2)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 3, 3, 2, 2])
    expected = F.cross_entropy(F.normalize(logits[:, outputs]) / 0.2, labels - outputs[0])
    torch.testing.assert_close(strategy.alignment_loss(logits, labels, strategy._rivals()), expected)


def test_a_class_that_comes_back_adds_to_its_statistics():
    stream = toy_stream("domain")
    strategy = SLCA()
    learn(strategy, stream, toy_model(stream))
    assert strategy.moments.counts.tolist() == [36, 36]


@pytest.mark.parametrize("part", ["head", "backbone"])
def test_frozen_parts_stay(part):
    stream = toy_stream(num_tasks=2)
    model = toy_model(stream)
    for task in stream.tasks:
        model.reveal(task)
    model.get_submodule(part).requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    learn(SLCA(), stream, model)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name in before if name.startswith(part)}


def test_the_head_is_not_aligned_after_the_first_task():
    stream = toy_stream("class")
    model, plain = toy_model(stream), toy_model(stream)
    learn(SLCA(), stream, model, tasks=1)
    learn(SLCA(epochs=0), stream, plain, tasks=1)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_next_task_goes_on_from_the_head_before_it_was_aligned():
    stream = toy_stream("class", num_tasks=4)
    model, plain = toy_model(stream), toy_model(stream)
    strategy = SLCA()
    learn(strategy, stream, model, tasks=2)
    learn(SLCA(epochs=0), stream, plain, tasks=2)
    assert not torch.equal(model.head.weight[:4], plain.head.weight[:4])
    model.reveal(stream.tasks[2])
    fresh = model.head.weight[4:6].clone()
    strategy.before_task(stream.tasks[2])
    assert torch.equal(model.head.weight[:4], plain.head.weight[:4])
    assert torch.equal(model.head.weight[4:6], fresh)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario):
    assert_resumes(SLCA, scenario)
