"""Tests of the simplest strategies."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.evaluate import accuracies
from cl_runner.fisher.estimators import Probe
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.mlp import MLP
from cl_runner.strategies import (
    EWC,
    L1,
    L2,
    NCM,
    Combined,
    Cumulative,
    Dropout,
    Finetune,
    Frozen,
    Independent,
    Joint,
    LwF,
)
from cl_runner.streams.base import Scenario
from cl_runner.streams.split import Split
from tests.toys import learn, toy_model, toy_stream

ALL = {
    "finetune": Finetune,
    "joint": Joint,
    "cumulative": Cumulative,
    "independent": Independent,
    "frozen": Frozen,
    "ncm": NCM,
    "l1": L1,
    "l2": L2,
    "dropout": lambda: Dropout(rate=0.1),
    "ewc": lambda: EWC(fisher=Probe(), strength=1.0),
    "lwf": LwF,
}


def digits(scenario="task"):
    return Split(name="digits", num_tasks=5, scenario=scenario)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("name", ALL)
def test_it_learns_in_every_scenario_in_which_it_can_work_and_refuses_the_others(name, scenario):
    strategy = ALL[name]()
    if Scenario(scenario) not in strategy.scenarios:
        with pytest.raises(ConfigError, match=r"strategy: expected stream\.scenario="):
            strategy.check(digits(scenario), EfficientNetLite0(pretrained=True))
        return
    strategy.check(digits(scenario), EfficientNetLite0(pretrained=True))
    stream = toy_stream(scenario)
    model = toy_model(stream, pretrained=True)
    learn(strategy, stream, model, epochs=25)
    rows = accuracies(strategy, 3, 16)
    row = rows.get(Scenario.TASK) or rows[Scenario.DOMAIN]  # accuracy among the task's own classes
    assert row[-1] >= 0.75  # the last task, at the least; chance is one half


@pytest.mark.parametrize("name", ALL)
def test_a_partly_frozen_backbone_is_no_error(name):
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    model.backbone[1].requires_grad_(False)
    before = model.backbone[1].weight.clone()
    learn(ALL[name](), stream, model)
    assert torch.equal(before, model.backbone[1].weight)


def test_joint_learns_all_tasks_once_the_last_has_come():
    stream = toy_stream()
    rows = learn(Joint(), stream, toy_model(stream), epochs=2)
    assert {row["task"] for row in rows} == {2}
    assert rows[-1]["task_step"] == 2 * 3 * 24 / 8


def test_joints_budget_in_iterations_counts_once_a_task():
    stream = toy_stream()
    rows = learn(Joint(), stream, toy_model(stream), iterations=5)
    assert rows[-1]["step"] == 15


def test_cumulative_keeps_all_earlier_data():
    stream = toy_stream()
    strategy = Cumulative()
    strategy.setup(toy_model(stream), stream)
    assert [len(strategy.training_data(task)) for task in stream.tasks] == [24, 48, 72]
    assert strategy.training_data(stream.tasks[1]).task_ids.unique().tolist() == [0, 1]


def test_independent_models_do_not_forget():
    stream = toy_stream()
    strategy = Independent()
    model = toy_model(stream)
    learn(strategy, stream, model, tasks=1)
    first = strategy.predict(stream.tasks[0].test.images, stream.tasks[0].test.task_ids)[:, :2]
    learned = dict(strategy.learned)
    learn(strategy, stream, model)
    strategy.learned[0] = learned[0]
    again = strategy.predict(stream.tasks[0].test.images, stream.tasks[0].test.task_ids)[:, :2]
    torch.testing.assert_close(first, again)
    assert not torch.equal(strategy.learned[0]["backbone.1.weight"], strategy.learned[1]["backbone.1.weight"])


def test_independent_models_start_each_task_from_the_same_weights():
    stream = toy_stream()
    strategy = Independent()
    model = toy_model(stream)
    fresh = model.backbone[1].weight.clone()
    learn(strategy, stream, model, tasks=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    assert torch.equal(fresh, model.backbone[1].weight)


def test_a_frozen_backbone_keeps_its_weights_and_its_statistics():
    stream = toy_stream()
    model = toy_model(stream, norm=True)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    head = model.head.weight.clone()
    learn(Frozen(), stream, model)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert not torch.equal(head, model.head.weight)


def test_a_frozen_backbone_sees_each_training_image_once_however_many_epochs_there_are():
    stream = toy_stream()
    model = toy_model(stream)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    learn(Frozen(), stream, model, epochs=7)
    assert sum(seen) == sum(len(task.train) for task in stream.tasks)


@pytest.mark.parametrize("teacher", [False, True])
def test_images_are_preprocessed_again_beside_their_features_only_for_a_teacher(teacher):
    stream = toy_stream()
    model = toy_model(stream)
    calls = []
    model.preprocess.register_forward_hook(lambda *_: calls.append(model.training))
    parts = {"frozen": Frozen(), **({"lwf": LwF()} if teacher else {})}
    rows = learn(Combined(parts=parts), stream, model, tasks=2, epochs=2, log_every=1)
    steps_with_teacher = sum("lwf" in row["loss"] for row in rows)
    assert calls.count(True) == steps_with_teacher == (6 if teacher else 0)


def test_a_head_learns_the_same_on_features_computed_before_as_through_the_backbone():
    class Through(Frozen):
        training_data = Finetune.training_data

    stream = toy_stream("class")
    heads = []
    for kind in (Frozen, Through):
        model = toy_model(stream, norm=True)
        learn(kind(), stream, model)
        heads.append(model.head.weight.detach().clone())
    torch.testing.assert_close(*heads)


def test_augmented_images_go_through_a_frozen_backbone_anew_each_time():
    stream = replace(toy_stream(), augment=("crop",))
    strategy = Frozen()
    strategy.setup(toy_model(stream), stream)
    assert not strategy.training_data(stream.tasks[0]).extras


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_ncm_names_the_class_with_the_nearest_mean(distance):
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = NCM(distance=distance)
    learn(strategy, stream, model)
    train, test = ([getattr(task, split) for task in stream.tasks] for split in ("train", "test"))
    with torch.no_grad():
        features = torch.cat([model(part.images).features for part in train])
        labels = torch.cat([part.labels for part in train])
        queries = torch.cat([model(part.images).features for part in test])
    means = torch.stack([features[labels == label].mean(0) for label in range(6)])
    if distance == "euclidean":
        by_hand = torch.stack([(queries - mean).norm(dim=1) for mean in means]).argmin(0)
    else:
        by_hand = torch.stack([nn.functional.cosine_similarity(queries, mean[None]) for mean in means]).argmax(0)
    images = torch.cat([part.images for part in test])
    assert torch.equal(strategy.predict(images, torch.zeros(len(images), dtype=torch.long)).argmax(1), by_hand)


def test_ncm_accumulates_a_class_that_comes_back():
    stream = toy_stream("domain")
    strategy = NCM()
    learn(strategy, stream, toy_model(stream))
    assert strategy.counts.tolist() == [36, 36]


@pytest.mark.parametrize("last", [nn.Identity(), nn.ReLU()], ids=["dropout", "relu"])
def test_dropout_is_everywhere_once_and_only_in_training(last):
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone.append(last)
    Dropout(rate=0.3).setup(model, stream)
    assert model.backbone[3].p == 0.3
    assert model.dropout.p == (0.3 if isinstance(last, nn.ReLU) else 0)  # the features have been through one
    images = stream.tasks[0].test.images
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    model.eval()
    assert torch.equal(model(images).logits, model(images).logits)


@pytest.mark.parametrize("towards", ["zero", "previous", "pretrained"])
def test_l2_is_half_strength_times_the_squared_distance(towards):
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    strategy = L2(strength=0.3, towards=towards)
    came = {name: value.detach().clone() for name, value in model.named_parameters()}
    learn(strategy, stream, model, tasks=1)
    after_first = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.25
    weights = dict(model.named_parameters())
    by_hand = torch.tensor(0.0)
    for name, value in weights.items():
        rows = slice(0, 2) if name.startswith("head") else slice(None)
        if name.startswith("backbone") or (name.startswith("head") and towards != "pretrained"):
            target = {"zero": torch.zeros_like(value), "previous": after_first[name], "pretrained": came[name]}[towards]
            by_hand = by_hand + (value[rows] - target[rows]).square().sum()
    batch = stream.tasks[0].train
    torch.testing.assert_close(strategy.penalties(batch, model(batch.images))["l2"], 0.15 * by_hand)


def test_l1_is_strength_times_the_sum_of_magnitudes():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = L1(strength=0.1, towards="zero")
    learn(strategy, stream, model, tasks=1)
    by_hand = sum(p.abs().sum() for p in model.backbone.parameters())
    by_hand = by_hand + model.head.weight[:2].abs().sum() + model.head.bias[:2].abs().sum()
    batch = stream.tasks[0].train
    torch.testing.assert_close(strategy.penalties(batch, model(batch.images))["l1"], 0.1 * by_hand)


@pytest.mark.parametrize("kind", [L1, L2])
def test_a_norm_towards_pretrained_weights_needs_some(kind):
    with pytest.raises(ConfigError, match=r"strategy\.towards: expected zero or previous"):
        kind(towards="pretrained").check(digits(), MLP(widths=[8]))
