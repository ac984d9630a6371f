"""Tests of all methods that predict from statistics of the features."""

import pytest
import torch
from torch import nn

from cl_runner.evaluate import accuracies
from cl_runner.models.preprocess import Preprocess
from cl_runner.strategies import NCM, SLDA, FeCAM, RanPAC
from cl_runner.streams.base import Scenario, Stream, Task
from tests.toys import learn, toy_model, toy_stream

ALL = {
    "ncm": NCM,
    "slda": SLDA,
    "fecam": FeCAM,
    "fecam_shared": lambda: FeCAM(covariance="shared"),
    "ranpac": lambda: RanPAC(projection=64),
    "ranpac_unprojected": lambda: RanPAC(projection=None),
    "ranpac_given_ridge": lambda: RanPAC(projection=64, ridge=1.0),
}
SCENARIOS = ["task", "domain", "class"]


def asked(strategy, stream):
    """Scores of all test images."""
    return torch.cat([strategy.predict(task.test.images, task.test.task_ids) for task in stream.tasks])


def in_one_task(stream):
    """The same training examples all at once, in another order."""
    parts = [task.train for task in reversed(stream.tasks)]
    whole = parts[0] + parts[1] + parts[2]
    classes = tuple(sorted({label for task in stream.tasks for label in task.classes}))
    sets = {"train": whole, "validation": whole[:0], "test": stream.tasks[0].test}
    return Stream(
        stream.scenario, [Task(0, classes, sets.__getitem__)], stream.num_classes, stream.image_shape, None, None
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", ALL)
def test_it_tells_classes_apart_in_every_scenario(name, scenario):
    stream = toy_stream(scenario)
    strategy = ALL[name]()
    learn(strategy, stream, toy_model(stream))
    rows = accuracies(strategy, 3, 16)[Scenario(scenario)]
    assert sum(rows) / 3 >= {"task": 0.9, "class": 0.6, "domain": 0.6}[scenario]  # chance: 1/2, 1/6, 1/2


@pytest.mark.parametrize("name", ["ncm", "slda", "fecam", "fecam_shared", "ranpac_unprojected", "ranpac_given_ridge"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_says_the_same_whatever_parts_the_examples_come_in(name, scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    streaming, at_once = ALL[name](), ALL[name]()
    torch.manual_seed(0)
    learn(streaming, stream, model)
    if name.startswith("ranpac"):
        at_once.fixed_ridge = streaming.ridge  # the best one depends on the task
    whole = in_one_task(stream)
    torch.manual_seed(0)
    at_once.setup(model, whole)
    at_once.after_task(whole.tasks[0])
    torch.testing.assert_close(asked(streaming, stream), asked(at_once, stream), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_size_of_the_batches_does_not_matter(name):
    stream = toy_stream("class")
    model = toy_model(stream)
    scores = []
    for size in (5, 256):
        strategy = ALL[name]()
        strategy.batch_size = size
        torch.manual_seed(0)
        learn(strategy, stream, model)
        scores.append(asked(strategy, stream))
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_the_model_changes(name):
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    with torch.no_grad():
        model(stream.tasks[0].train.images)  # running statistics differ from the initial ones
    before = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("backbone")}
    rows = learn(ALL[name](), stream, model)
    assert not rows
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ALL)
def test_a_class_that_has_not_come_is_never_named(name):
    stream = toy_stream("class")
    strategy = ALL[name]()
    learn(strategy, stream, toy_model(stream), tasks=2)
    scores = asked(strategy, stream)
    assert (scores[:, :4] > -torch.inf).all()
    assert (scores[:, 4:] == -torch.inf).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", ALL)
def test_being_asked_between_tasks_does_not_change_later_answers(name, scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    silent, asked_often = ALL[name](), ALL[name]()
    learn(silent, stream, model)
    asked_often.setup(model, stream)
    for task in stream.tasks:
        torch.manual_seed(task.index)
        asked_often.after_task(task)
        scores = asked(asked_often, stream)
    assert torch.equal(scores, asked(silent, stream))


@pytest.mark.parametrize("name", ALL)
def test_it_can_be_asked_before_anything_has_come_and_solves_nothing_for_it(name, monkeypatch):
    stream = toy_stream("domain")
    strategy = ALL[name]()
    monkeypatch.setattr(strategy, "fit", lambda: pytest.fail("there is nothing to fit"))
    strategy.setup(toy_model(stream), stream)
    strategy.model.eval()
    assert (asked(strategy, stream) == -torch.inf).all()


@pytest.mark.parametrize("name", ALL)
def test_images_are_not_augmented(name):
    stream = toy_stream("class")
    scores = []
    for augment in ((), ("crop", "flip")):
        model = toy_model(stream)
        model.preprocess = Preprocess(1, augment=augment, crop_padding=2)
        model.train()
        strategy = ALL[name]()
        torch.manual_seed(0)
        strategy.setup(model, stream)
        for task in stream.tasks:
            strategy.after_task(task)
        scores.append(asked(strategy, stream))
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_is_all_that_the_answers_need(name):
    stream = toy_stream("class")
    model = toy_model(stream)
    torch.manual_seed(0)
    whole, stopped, resumed = ALL[name](), ALL[name](), ALL[name]()
    learn(whole, stream, model)
    torch.manual_seed(0)
    learn(stopped, stream, model, tasks=2)
    torch.manual_seed(7)
    resumed.setup(model, stream)
    resumed.load_state_dict(stopped.state_dict())
    torch.manual_seed(2)
    resumed.after_task(stream.tasks[2])
    assert torch.equal(asked(whole, stream), asked(resumed, stream))


def test_statistics_are_gathered_in_float64():
    stream = toy_stream("class")
    model = toy_model(stream)
    nn.init.constant_(model.backbone[1].bias, 1e4)  # features far from zero, close to each other
    strategy = SLDA()
    learn(strategy, stream, model)
    features = torch.cat([model(task.train.images).features.detach().double() for task in stream.tasks])
    labels = torch.cat([task.train.labels for task in stream.tasks])
    residuals = torch.cat([features[labels == k] - features[labels == k].mean(0) for k in range(6)])
    expected = residuals.T @ residuals / len(residuals)
    torch.testing.assert_close(strategy.moments.covariance(), expected, rtol=1e-8, atol=1e-10)
