import pytest
import torch

from cl_runner.strategies import MAS, Finetune
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream

SCENARIOS = ["task", "domain", "class"]


def by_samples(model, examples, outputs):
    """The mean of |d||z||^2 / dw|, a sample at a time."""
    model.eval()
    live = dict(model.named_parameters())
    totals = {name: torch.zeros_like(value) for name, value in live.items()}
    for row in range(len(examples)):
        norm = model(examples.images[row : row + 1]).logits[:, outputs].square().sum()
        for total, gradient in zip(totals.values(), torch.autograd.grad(norm, list(live.values())), strict=True):
            total += gradient.abs() / len(examples)
    return totals


@pytest.mark.parametrize(("scenario", "outputs"), [("task", [2, 3]), ("domain", [0, 1]), ("class", [0, 1, 2, 3])])
def test_the_importance_is_that_of_a_slow_loop_summed_over_tasks(scenario, outputs):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = MAS(strength=0.5)
    learn(strategy, stream, model, tasks=1)
    first = strategy.importance.values
    learn_second(strategy, stream, model)
    second = by_samples(model, stream.tasks[1].train, outputs)
    for name, values in strategy.importance.values.items():
        torch.testing.assert_close(values, first[name] + second[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(strategy.penalty.terms[0].anchor[name], model.state_dict()[name])


def learn_second(strategy, stream, model):
    model.reveal(stream.tasks[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    strategy.after_task(stream.tasks[1])


def test_the_average_counts_each_class_once():
    found = {}
    for accumulation in ("sum", "average"):
        stream = toy_stream("domain")
        strategy = MAS(strength=0.0, accumulation=accumulation)
        learn(strategy, stream, toy_model(stream), tasks=2)
        found[accumulation] = strategy.importance.values
    for name, values in found["sum"].items():
        torch.testing.assert_close(found["average"][name], values / 2)


def test_labels_do_not_matter():
    found = []
    for flipped in (False, True):
        stream = toy_stream()
        model = toy_model(stream)
        strategy = MAS()
        strategy.setup(model, stream)
        model.reveal(stream.tasks[0])
        task = stream.tasks[0]
        if flipped:
            train = task.train
            train.labels.copy_(1 - train.labels)
            task._build = {"train": train}.__getitem__
        strategy.after_task(task)
        found.append(strategy.importance.values)
    assert all(torch.equal(values, found[1][name]) for name, values in found[0].items())


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_no_row_that_was_not_revealed_is_held(scenario):
    stream = toy_stream(scenario)
    strategy = MAS(logits="all")
    learn(strategy, stream, toy_model(stream), tasks=2)
    weight = strategy.importance.values["head.weight"]
    assert weight[:4].any(1).all()
    assert not weight[4:].any()


def test_it_forgets_less_than_fine_tuning():
    losses = {}
    for kind in (Finetune, lambda: MAS(strength=0.5)):
        stream = toy_stream("domain")
        strategy = kind()
        learn(strategy, stream, toy_model(stream), epochs=15)
        first = stream.tasks[0].train
        losses[type(strategy)] = strategy.task_loss(first, strategy.model(first.images)).item()
    assert losses[MAS] < 0.7 * losses[Finetune]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario):
    assert_resumes(lambda: MAS(strength=0.5), scenario, norm=True)


def test_a_wholly_frozen_model_is_no_error():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone.requires_grad_(False)
    strategy = MAS(head=False)
    learn(strategy, stream, model)
    assert not strategy.penalty.terms
