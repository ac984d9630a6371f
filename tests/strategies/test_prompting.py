"""Tests of all methods that add a few parameters to a frozen vision transformer."""

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.evaluate import accuracies
from cl_runner.models import MLP, Timm
from cl_runner.strategies import EASE, L2P, CODAPrompt, DualPrompt
from cl_runner.streams.base import Scenario
from cl_runner.streams.split import Split
from tests.strategies import midway
from tests.toys import learn, toy_model, toy_stream, toy_training
from tests.vits import toy_vit_model

METHODS = {
    "l2p": lambda: L2P(pool=6, length=2, top=3),
    "dualprompt": lambda: DualPrompt(general_blocks=[0], expert_blocks=[1, 2], general_length=2, expert_length=4),
    "coda_prompt": lambda: CODAPrompt(blocks=[0, 1, 2], components=4, length=4),
    "ease": lambda: EASE(width=8, scale=1.0),
}
SCENARIOS = ["task", "domain", "class"]
every_method = pytest.mark.parametrize("name", METHODS)


def asked(strategy, stream):
    strategy.model.eval()
    with torch.no_grad():
        return torch.cat([strategy.predict(task.test.images, task.test.task_ids) for task in stream.tasks])


@pytest.mark.parametrize("scenario", SCENARIOS)
@every_method
def test_it_learns_in_every_scenario(name, scenario):
    stream = toy_stream(scenario)
    strategy = METHODS[name]()
    learn(strategy, stream, toy_vit_model(stream), epochs=12)
    rows = accuracies(strategy, 3, 24)
    assert (rows.get(Scenario.TASK) or rows[Scenario.DOMAIN])[-1] >= 0.75


@every_method
def test_until_the_first_task_begins_the_model_says_what_it_said(name):
    stream = toy_stream()
    model = toy_vit_model(stream)
    images = stream.tasks[0].test.images
    before = model(images).logits
    METHODS[name]().setup(model, stream)
    assert torch.equal(model(images).logits, before)


@every_method
def test_the_backbone_is_not_touched_and_keeps_its_names(name):
    stream = toy_stream()
    model = toy_vit_model(stream)
    names = list(model.plain_state())
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    head = model.head.weight.clone()
    strategy = METHODS[name]()
    training, _ = toy_training(strategy, stream, model)
    added = {key: value.clone() for key, value in model.named_parameters() if not key.startswith(("backbone", "head"))}
    for task in stream.tasks:
        model.reveal(task)
        strategy.before_task(task)
        training.learn(task, task.train)
        if task.index == 0:
            assert all(not torch.equal(model.get_parameter(key), value) for key, value in added.items())
        strategy.after_task(task)
    assert list(model.plain_state()) == names
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not torch.equal(head, model.head.weight)
    assert not any(module.training for module in model.train().backbone.modules())


@every_method
@pytest.mark.parametrize("task", [0, 2])
def test_it_resumes_in_the_middle_of_a_task(name, task, monkeypatch):
    monkeypatch.setattr(midway, "toy_model", toy_vit_model)
    midway.assert_resumes(METHODS[name], task=task)


@every_method
def test_a_run_that_is_taken_up_after_its_last_task_answers_as_it_did(name):
    stream = toy_stream("class")
    model, again = toy_vit_model(stream), toy_vit_model(stream)
    strategy, resumed = METHODS[name](), METHODS[name]()
    learn(strategy, stream, model)
    resumed.setup(again, stream)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(strategy.state_dict())
    assert torch.equal(asked(resumed, stream), asked(strategy, stream))


@every_method
def test_an_optimizer_that_is_kept_moves_what_the_next_task_learns(name):
    stream = toy_stream()
    model = toy_vit_model(stream)
    strategy = METHODS[name]()
    training, _ = toy_training(strategy, stream, model, optimizer_state="keep", epochs=2)
    for task in stream.tasks:
        model.reveal(task)
        strategy.before_task(task)
        before = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
        training.learn(task, task.train)
        assert all(not torch.equal(model.get_parameter(key), value) for key, value in before.items())
        strategy.after_task(task)


@every_method
def test_a_frozen_backbone_is_no_error(name):
    stream = toy_stream()
    model = toy_vit_model(stream)
    model.backbone.requires_grad_(False)
    learn(METHODS[name](), stream, model, tasks=1, epochs=1)


@every_method
def test_other_networks_are_refused_before_data_is_loaded(name):
    stream = Split(name="digits", num_tasks=5, scenario="class")
    default = {"l2p": L2P, "dualprompt": DualPrompt, "coda_prompt": CODAPrompt, "ease": EASE}[name]()
    default.check(stream, Timm(name="vit_tiny_patch16_224", pretrained=False))
    for other in (MLP(widths=[8]), Timm(name="test_resnet", pretrained=False)):
        with pytest.raises(ConfigError, match=r"strategy: expected a plain vision transformer of timm"):
            default.check(stream, other)
    toy = toy_stream()
    with pytest.raises(ConfigError, match=r"strategy: expected a plain vision transformer of timm"):
        METHODS[name]().setup(toy_model(toy), toy)


def test_what_does_not_fit_the_transformer_is_refused_before_data_is_loaded():
    stream, model = Split(name="digits", num_tasks=5, scenario="class"), Timm(name="test_vit", pretrained=False)
    with pytest.raises(ConfigError, match=r"strategy\.expert_blocks: expected numbers of blocks, 0 to 5, got 6"):
        DualPrompt(expert_blocks=[2, 6]).check(stream, model)
    with pytest.raises(ConfigError, match=r"strategy\.components: expected at most 12 .*, got 13"):
        CODAPrompt(components=13).check(stream, model)
    with pytest.raises(ConfigError, match=r"strategy\.top: expected at most pool=4, got 5"):
        L2P(pool=4, top=5)
    with pytest.raises(ConfigError, match=r"strategy\.length: expected an even number .*, got 7"):
        CODAPrompt(length=7)
