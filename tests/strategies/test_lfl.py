import pytest
import torch

from cl_runner.strategies import LFL, Finetune
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream

SCENARIOS = ["task", "domain", "class"]


def features_of(model, examples):
    model.eval()
    with torch.no_grad():
        return model(examples.images).features


def test_the_penalty_is_half_the_squared_distance_of_the_features_from_the_teachers():
    stream = toy_stream("domain")
    model = toy_model(stream)
    strategy = LFL(strength=3.0)
    learn(strategy, stream, model, tasks=1)
    strategy.before_task(stream.tasks[1])
    batch = stream.tasks[1].train
    before = features_of(model, batch)
    with torch.no_grad():
        model.backbone[1].bias += 0.3
    output = model(batch.images)
    by_hand = 1.5 * sum((one - other).square().sum() for one, other in zip(output.features, before, strict=True)) / 24
    torch.testing.assert_close(strategy.penalties(batch, output)["lfl"], by_hand)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_features_of_earlier_tasks_move_less_than_by_fine_tuning(scenario):
    moved = {}
    for kind in (Finetune, lambda: LFL(strength=1.0)):
        stream = toy_stream(scenario)
        model = toy_model(stream)
        strategy = kind()
        learn(strategy, stream, model, tasks=1)
        before = features_of(model, stream.tasks[0].train)
        learn_second(strategy, stream, model)
        moved[type(strategy)] = (features_of(model, stream.tasks[0].train) - before).norm()
    assert moved[LFL] < 0.7 * moved[Finetune]


def learn_second(strategy, stream, model):
    task = stream.tasks[1]
    model.reveal(task)
    strategy.before_task(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(30):
        output = model.train()(task.train.images)
        optimizer.zero_grad()
        terms = [strategy.task_loss(task.train, output), *strategy.penalties(task.train, output).values()]
        torch.stack(terms).sum().backward()
        optimizer.step()
        strategy.after_step(task.train, output)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_head_of_earlier_classes_is_held_against_gradient_momentum_and_decay(scenario, hold):
    stream = toy_stream(scenario)
    model = toy_model(stream, active_logits="all")
    strategy = LFL(strength=1.0, hold_head=hold)
    learn(strategy, stream, model, tasks=1)
    before, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    learn_second(strategy, stream, model)
    same = (model.head.weight == before).all(1)
    assert same[:2].all() == hold
    assert (model.head.bias == bias)[:2].all() == hold
    if scenario != "domain":
        assert not same[2:4].any()


def test_the_first_task_is_free_unless_the_model_came_with_a_head():
    for pretrained in (False, True):
        stream = toy_stream()
        rows = learn(LFL(strength=1.0), stream, toy_model(stream, pretrained=pretrained), tasks=2)
        named = {row["task"]: "lfl" in row["loss"] for row in rows}
        assert named == {0: pretrained, 1: True}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario):
    assert_resumes(lambda: LFL(strength=1.0), scenario, norm=True)
