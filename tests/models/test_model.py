import copy

import pytest
import torch
from torch import nn

from cl_runner.models.model import Model, PretrainedView
from cl_runner.models.preprocess import Preprocess
from tests.models.samples import images, stream_of

SHAPE = (1, 4, 4)
DISJOINT, SHARED = ((0, 1), (2, 3), (4, 5)), ((0, 1), (0, 1), (0, 1))
BOTH = [("task", DISJOINT), ("class", DISJOINT), ("domain", SHARED)]


def model_for(scenario="class", classes=DISJOINT, active_logits=None, head=None, seed=0, init="torch") -> Model:
    stream = stream_of(SHAPE, scenario, classes=classes)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
    return Model(Preprocess(1), backbone, 8, stream, active_logits, init, head, seed)


def visible_after(model: Model, classes, tasks: int) -> list[list[list[int]]]:
    """For each number of revealed tasks, for each task, the outputs that its loss sees."""
    stream = stream_of(SHAPE, classes=classes)
    seen = []
    for task in stream.tasks[:tasks]:
        model.reveal(task)
        seen.append([row.nonzero().flatten().tolist() for row in model.visible])
    return seen


def test_a_teacher_sees_the_pixels_that_the_student_saw():
    model = model_for()
    model.preprocess = Preprocess(1, augment=["brightness"])
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model.train()(images(SHAPE))
    assert torch.equal(output.inputs, seen[0])
    assert not torch.equal(model(images(SHAPE)).inputs, seen[0])  # augmented anew


@pytest.mark.parametrize("active_logits", [None, "current"])
def test_where_the_task_is_told_each_task_sees_its_own_outputs(active_logits):
    seen = visible_after(model_for("task", active_logits=active_logits), DISJOINT, 3)
    assert seen == [[[0, 1], [], []], [[0, 1], [2, 3], []], [[0, 1], [2, 3], [4, 5]]]


@pytest.mark.parametrize(("scenario", "active_logits"), [("class", None), ("task", "seen"), ("class", "seen")])
def test_seen_shows_every_task_all_outputs_so_far(scenario, active_logits):
    seen = visible_after(model_for(scenario, active_logits=active_logits), DISJOINT, 3)
    assert seen == [[[0, 1]] * 3, [[0, 1, 2, 3]] * 3, [[0, 1, 2, 3, 4, 5]] * 3]


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_all_shows_every_output_from_the_first_task(scenario):
    seen = visible_after(model_for(scenario, active_logits="all"), DISJOINT, 1)
    assert seen == [[[0, 1, 2, 3, 4, 5]] * 3]


def test_where_tasks_share_their_classes_every_output_is_seen():
    assert visible_after(model_for("domain", SHARED), SHARED, 1) == [[[0, 1]] * 3]


def test_current_in_a_class_incremental_stream_hides_the_other_tasks_outputs():
    seen = visible_after(model_for("class", active_logits="current"), DISJOINT, 2)
    assert seen[1] == [[0, 1], [2, 3], []]


@pytest.mark.parametrize(("scenario", "classes"), BOTH)
@pytest.mark.parametrize("active_logits", [None, "current", "seen", "all"])
def test_a_row_is_drawn_afresh_when_it_is_first_seen_and_never_again(scenario, classes, active_logits):
    model = model_for(scenario, classes, active_logits)
    for task in stream_of(SHAPE, classes=classes).tasks:
        known, before = model.revealed, model.head.weight.detach().clone()
        model.reveal(task)
        changed = (model.head.weight != before).all(1)
        assert torch.equal(changed, model.revealed & ~known)


def test_rows_depend_on_the_seed_alone_and_differ_between_tasks():
    first, second, other = model_for(), model_for(), model_for(seed=1)
    for model in (first, second, other):
        for task in stream_of(SHAPE).tasks:
            model.reveal(task)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert len(first.head.weight.unique(dim=0)) == 6


def test_rows_follow_the_chosen_draw():
    model = model_for(init="truncated_normal")
    model.reveal(stream_of(SHAPE).tasks[0])
    assert model.head.weight[:2].abs().max() <= 0.04
    assert not model.head.bias[:2].any()


def test_restrict_leaves_what_an_example_may_see_and_hides_the_rest():
    model = model_for("task")
    for task in stream_of(SHAPE).tasks[:2]:
        model.reveal(task)
    logits = torch.arange(12.0).view(2, 6)
    hidden = -torch.inf
    expected = torch.tensor([[hidden, hidden, 2, 3, hidden, hidden], [6, 7, hidden, hidden, hidden, hidden]])
    assert torch.equal(model.restrict(logits, torch.tensor([1, 0])), expected)


def test_the_output_carries_logits_features_and_the_pixels_that_gave_them():
    model = model_for().eval()
    output = model(images(SHAPE))
    assert output.logits.shape == (4, 6)
    torch.testing.assert_close(output.inputs, images(SHAPE) / 255)
    torch.testing.assert_close(model.head(output.features), output.logits)
    torch.testing.assert_close(model.encode(output.inputs).logits, output.logits)


def test_held_statistics_stay_where_they_are_in_every_mode():
    model = model_for()
    norm = model.backbone[2]
    model.keep_in_eval([norm])
    for mode in (True, False, True):
        model.train(mode)
        assert model.backbone[1].training is mode
        assert not norm.training
    model(images(SHAPE))
    assert norm.num_batches_tracked == 0


def test_what_is_held_in_addition_releases_nothing():
    model = model_for()
    norm, other = model.backbone[2], model.backbone[1]
    model.keep_in_eval([norm])
    model.keep_in_eval([other])
    model.train()
    assert (norm.training, other.training, model.head.training) == (False, False, True)


def test_a_copy_holds_its_own_statistics():
    model = model_for()
    model.keep_in_eval([model.backbone[2]])
    twin = copy.deepcopy(model).train()
    assert not twin.backbone[2].training
    twin(images(SHAPE))
    assert twin.backbone[2].num_batches_tracked == 0


def test_the_pretrained_head_is_frozen_and_part_of_the_state():
    model = model_for(head=nn.Linear(8, 5))
    assert not any(parameter.requires_grad for parameter in model.pretrained_head.parameters())
    assert "pretrained_head.weight" in model.state_dict()


def test_the_pretrained_view_is_the_backbone_as_it_now_is_under_the_pretrained_head():
    model = model_for(head=nn.Linear(8, 5)).eval()
    view = PretrainedView(model).eval()
    with torch.no_grad():
        model.backbone[1].weight.mul_(2)
    output = view(images(SHAPE))
    torch.testing.assert_close(output.logits, model.pretrained_head(model(images(SHAPE)).features))
    assert torch.equal(view.restrict(output.logits, torch.zeros(4, dtype=torch.int64)), output.logits)
    trainable = {name for name, value in view.named_parameters() if value.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}


def test_plain_weights_are_the_backbones_and_the_heads_without_prefixes():
    model = model_for(head=nn.Linear(8, 5))
    state = model.plain_state()
    assert set(state) == {*model.backbone.state_dict(), "head.weight", "head.bias"}
    assert torch.equal(state["head.weight"], model.head.weight)


def test_plain_weights_are_copies():
    model = model_for()
    state = model.plain_state()
    with torch.no_grad():
        model.head.weight.zero_()
    assert state["head.weight"].any()
