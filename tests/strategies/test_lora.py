import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.evaluate import accuracies
from cl_runner.models import MLP, Timm
from cl_runner.strategies import LoRA
from cl_runner.streams.base import Scenario
from cl_runner.streams.split import Split
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream, toy_training

SCENARIOS = ["task", "domain", "class"]


def digits(scenario="task"):
    return Split(name="digits", num_tasks=5, scenario=scenario)


def backbone(model):
    return {name: value.clone() for name, value in model.backbone.state_dict().items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_learns_in_every_scenario(scenario):
    stream = toy_stream(scenario)
    strategy = LoRA(rank=4)
    learn(strategy, stream, toy_model(stream), epochs=25)
    rows = accuracies(strategy, 3, 16)
    assert (rows.get(Scenario.TASK) or rows[Scenario.DOMAIN])[-1] >= 0.75


def test_before_the_first_step_the_model_says_what_it_said():
    stream = toy_stream()
    model = toy_model(stream)
    images = stream.tasks[0].test.images
    model.reveal(stream.tasks[0])
    before = model(images).logits
    strategy = LoRA()
    strategy.setup(model, stream)
    assert torch.equal(model(images).logits, before)
    strategy.before_task(stream.tasks[0])
    assert torch.equal(model(images).logits, before)


def test_a_branch_adds_alpha_over_rank_times_its_product():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = LoRA(rank=4, alpha=12.0)
    strategy.setup(model, stream)
    (branch,), layer = strategy.branches, model.backbone[1]
    nn.init.normal_(branch.up.weight)
    inputs = torch.randn(3, 16)
    plain = F.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs), plain + 3 * inputs @ branch.down.weight.T @ branch.up.weight.T)


class Reading(nn.Sequential):
    """Reads the first layer's weight without calling the layer, like BEiT's attention."""

    def forward(self, inputs):
        first, second = self
        return second(F.linear(inputs, first.weight, first.bias))


def test_nothing_is_put_beside_a_layer_that_is_never_called(caplog):
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone = nn.Sequential(nn.Flatten(), Reading(nn.Linear(16, 8), nn.Linear(8, 8)))
    strategy = LoRA()
    strategy.setup(model, stream)
    assert strategy.layers == [model.backbone[1][1]]
    assert "no branch beside 1 layers not called as modules, 1.0 first" in caplog.text
    with pytest.raises(ConfigError, match=r"strategy\.layers: expected layers that the backbone calls .*, got 1\.0"):
        LoRA(layers=["1.0"]).setup(model, stream)


def test_only_branches_and_head_learn():
    stream = toy_stream()
    model = toy_model(stream, norm=True)
    training, _ = toy_training(LoRA(), stream, model)
    before, head = backbone(model), model.head.weight.clone()
    model.reveal(stream.tasks[0])
    training.learn(stream.tasks[0], stream.tasks[0].train)
    assert all(torch.equal(value, before[name]) for name, value in backbone(model).items())
    assert all(branch.up.weight.any() for branch in model.adapters)
    assert not torch.equal(head, model.head.weight)


def test_merging_after_a_task_changes_the_weights_and_not_the_answers():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = LoRA(rank=2)
    training, _ = toy_training(strategy, stream, model)
    before, task = backbone(model), stream.tasks[0]
    model.reveal(task)
    training.learn(task, task.train)
    unmerged = model(task.test.images).logits
    strategy.after_task(task)
    torch.testing.assert_close(model(task.test.images).logits, unmerged, rtol=1e-6, atol=1e-6)
    change = backbone(model)["1.weight"] - before["1.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    assert torch.equal(backbone(model)["1.bias"], before["1.bias"])


def test_a_file_of_weights_holds_the_merged_ones_under_plain_names():
    stream = toy_stream()
    model, fresh = toy_model(stream), toy_model(stream)
    names = list(fresh.plain_state())
    learn(LoRA(), stream, model)
    assert list(model.plain_state()) == names
    own = {name: value for name, value in model.plain_state().items() if not name.startswith("head")}
    fresh.backbone.load_state_dict(own)
    fresh.head.load_state_dict(model.head.state_dict())
    images = stream.tasks[0].test.images
    torch.testing.assert_close(fresh.eval()(images).logits, model.eval()(images).logits, rtol=1e-6, atol=1e-6)


def test_loras_that_are_kept_are_each_tasks_own():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = LoRA(merge=False)
    before = backbone(model)
    learn(strategy, stream, model, tasks=1)
    test = [task.test for task in stream.tasks]
    first = strategy.predict(test[0].images, test[0].task_ids)[:, :2]
    learn(continued := LoRA(merge=False), stream, model := toy_model(stream))
    model.eval()
    again = continued.predict(test[0].images, test[0].task_ids)[:, :2]
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in backbone(model).items())
    mixed = test[0] + test[2]
    scores = continued.predict(mixed.images, mixed.task_ids)
    torch.testing.assert_close(scores[:24, :2], again)
    torch.testing.assert_close(scores[24:], model(test[2].images).logits)  # the last task's updates are in place


def test_loras_that_are_kept_need_a_told_task():
    assert LoRA(merge=False).needs_task_id
    assert not LoRA().needs_task_id
    for scenario in ("domain", "class"):
        with pytest.raises(ConfigError, match=rf"strategy\.merge: expected false only .*, got {scenario}"):
            LoRA(merge=False).check(digits(scenario), MLP(widths=[8]))
    LoRA(merge=False).check(digits(), MLP(widths=[8]))


def test_what_is_frozen_gets_no_branch():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone.requires_grad_(False)
    before = backbone(model)
    learn(LoRA(), stream, model)
    assert not list(model.adapters)
    assert all(torch.equal(value, before[name]) for name, value in backbone(model).items())


def test_a_layer_that_is_frozen_gets_no_branch_while_the_others_do():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    model.backbone[1].requires_grad_(False)
    before = backbone(model)
    strategy = LoRA()
    learn(strategy, stream, model)
    assert strategy.layers == [model.backbone[3]]
    changed = {name for name, value in backbone(model).items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight"}


def test_patterns_choose_layers_and_are_checked_before_data_is_loaded():
    LoRA(layers=["blocks.*.attn.qkv"]).check(digits(), Timm(name="test_vit", pretrained=False))
    with pytest.raises(ConfigError, match=r"strategy\.layers: expected patterns of .*linear1.*, got 'linaer1'"):
        LoRA(layers=["linaer1"]).check(digits(), MLP(widths=[8]))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_it_resumes_in_the_middle_of_a_task(merge, task):
    assert_resumes(lambda: LoRA(merge=merge), task=task)
