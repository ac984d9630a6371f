from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.strategies import LwF
from cl_runner.streams.base import Task
from cl_runner.streams.split import Split
from tests.toys import assert_same_with_gradients, learn, toy_model, toy_stream, toy_training

DIGITS = Split(name="digits", num_tasks=5)


def at_task(strategy, stream, model, index):
    """Learn the tasks before `index`, then begin that one."""
    learn(strategy, stream, model, tasks=index)
    model.reveal(stream.tasks[index])
    strategy.before_task(stream.tasks[index])
    return stream.tasks[index].train


def test_the_student_starts_each_task_in_full_agreement_with_its_teacher():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = LwF()
    batch = at_task(strategy, stream, model, 1)
    torch.testing.assert_close(strategy.penalties(batch, model(batch.images))["lwf"], torch.tensor(0.0))


def test_a_softmax_a_task_is_refused_where_every_task_has_a_single_class():
    single, model = Split(name="digits", num_tasks=10, scenario="class"), EfficientNetLite0(pretrained=False)
    refused = pytest.raises(ConfigError, match=r"strategy\.softmax: expected joint or all .* strategy\.softmax=joint")
    with refused:
        LwF(softmax="task").check(single, model)
    with refused:
        LwF().check(replace(single, scenario="task"), model)
    LwF().check(single, model)  # joint
    LwF(softmax="task").check(replace(single, max_tasks=1), model)  # there are no old classes
    LwF(softmax="task").check(Split(name="digits", num_tasks=9, first_task_classes=2, scenario="class"), model)
    pretrained = EfficientNetLite0(pretrained=True)
    LwF(softmax="task").check(single, pretrained)  # the pretrained model can be distilled
    with refused:
        LwF(softmax="task", teacher="previous").check(single, pretrained)


def test_a_softmax_a_task_is_refused_as_soon_as_the_classes_are_known():
    stream = toy_stream("class")
    tasks = [Task(task.index, task.classes[:1], lambda name: stream.tasks[0].train) for task in stream.tasks]
    single = replace(stream, tasks=tasks)
    with pytest.raises(ConfigError, match=r"strategy\.softmax: expected joint or all"):
        LwF(softmax="task").setup(toy_model(single), single)
    LwF(softmax="task").setup(toy_model(single, pretrained=True), single)


def test_the_teacher_is_still_while_the_student_trains():
    stream = toy_stream()
    model = toy_model(stream, norm=True, pretrained=True)
    strategy = LwF()
    data = at_task(strategy, stream, model, 1)
    teachers = [strategy.teacher, strategy.pretrained]
    before = [{name: value.clone() for name, value in teacher.state_dict().items()} for teacher in teachers]
    student = {name: value.clone() for name, value in model.state_dict().items()}
    training, _ = toy_training_in_place(strategy, stream, model)
    training.learn(stream.tasks[1], data)
    model.train()
    for teacher, state in zip(teachers, before, strict=True):
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert not torch.equal(student["backbone.2.running_mean"], model.state_dict()["backbone.2.running_mean"])


def toy_training_in_place(strategy, stream, model):
    """The training of a strategy that is already set up."""
    kept = strategy.teacher, strategy.pretrained, strategy.old_groups, strategy.number
    made = toy_training(strategy, stream, model)
    strategy.teacher, strategy.pretrained, strategy.old_groups, strategy.number = kept
    return made


def perturbed(model):
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("squared", [True, False])
def test_the_distillation_is_the_kl_divergence_at_the_temperature(squared):
    strategy = LwF(temperature=3.0, squared_temperature=squared)
    student, teacher = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).unbind()
    by_hand = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = torch.softmax(t / 3, 0), torch.softmax(s / 3, 0)
        by_hand += (p * (p / q).log()).sum() / 7
    torch.testing.assert_close(strategy.distillation(student, teacher), by_hand * (9 if squared else 1))


@pytest.mark.parametrize(
    ("scenario", "groups"), [("task", [[0, 1], [2, 3]]), ("class", [[0, 1, 2, 3]]), ("domain", [[0, 1]])]
)
def test_all_earlier_outputs_share_a_softmax_where_classes_of_all_tasks_are_told_apart(scenario, groups):
    stream = toy_stream(scenario)
    strategy = LwF()
    at_task(strategy, stream, toy_model(stream), 2)
    assert [group.tolist() for group in strategy.old_groups] == groups


def test_labels_of_new_classes_do_not_push_down_the_old_ones_that_are_distilled():
    stream = toy_stream("class")
    model = toy_model(stream, active_logits=LwF.active_logits)
    strategy = LwF()
    batch = at_task(strategy, stream, model, 1)
    model.zero_grad()
    strategy.task_loss(batch, model(batch.images)).backward()
    assert (model.head.weight.grad[:2] == 0).all()
    assert (model.head.weight.grad[2:4] != 0).any(1).all()


def test_the_divergence_of_nearly_equal_answers_survives_bf16():
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    student = (teacher + 0.01 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).bfloat16()
    exact = LwF().distillation(student.double(), teacher.double())
    assert LwF().distillation(student, teacher) == pytest.approx(exact.item(), rel=1e-2)


def test_each_earlier_task_has_a_softmax_of_its_own_or_all_share_one():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = LwF(softmax="task")
    batch = at_task(strategy, stream, model, 2)
    target = model(batch.images).logits.detach()
    perturbed(model)
    output = model(batch.images)

    def kl(columns):
        student, teacher = (output.logits[:, columns] / 2).log_softmax(1), (target[:, columns] / 2).log_softmax(1)
        return 4 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    # The third task: two earlier ones, each counting once by default.
    torch.testing.assert_close(strategy.penalties(batch, output)["lwf"], kl([0, 1]) + kl([2, 3]))
    joint = LwF(softmax="joint")
    joint.setup(model, stream)
    joint.before_task(stream.tasks[2])
    joint.teacher = strategy.teacher
    torch.testing.assert_close(joint.penalties(batch, output)["lwf"], 2 * kl([0, 1, 2, 3]))
    whole = LwF(softmax="all")
    whole.setup(model, stream)
    whole.before_task(stream.tasks[2])
    whole.teacher = strategy.teacher
    torch.testing.assert_close(whole.penalties(batch, output)["lwf"], 2 * kl([0, 1, 2, 3, 4, 5]))


def test_the_first_task_has_no_previous_teacher_but_the_pretrained_one():
    stream = toy_stream()
    rows = learn(LwF(), stream, toy_model(stream, pretrained=True), tasks=2)
    first = [row["loss"] for row in rows if row["task"] == 0]
    second = [row["loss"] for row in rows if row["task"] == 1]
    assert all("lwf" not in losses and losses["lwf_pretrained"] > 0 for losses in first)
    assert all(losses["lwf"] > 0 and losses["lwf_pretrained"] > 0 for losses in second)


def test_each_teacher_pulls_the_student_with_a_strength_of_its_own():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    images = stream.tasks[1].train.images
    came = model.eval().pretrained_head(model(images).features).detach()
    strategy = LwF(strength=0.3, pretrained_strength=0.7)
    batch = at_task(strategy, stream, model, 1)
    before = model.eval()(images).logits[:, :2].detach()
    perturbed(model)
    output = model(images)

    def kl(student, teacher):
        student, teacher = (student / 2).log_softmax(1), (teacher / 2).log_softmax(1)
        return 4 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    terms = strategy.penalties(batch, output)
    assert list(terms) == ["lwf", "lwf_pretrained"]
    assert_same_with_gradients(terms["lwf"], 0.3 * kl(output.logits[:, :2], before), model)
    under_its_head = model.pretrained_head(output.features)
    assert_same_with_gradients(terms["lwf_pretrained"], 0.7 * kl(under_its_head, came), model)
    assert LwF(strength=0.3).pretrained_strength == 0.3


def test_the_pretrained_teacher_is_the_model_as_it_came_under_its_own_head():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    batch = stream.tasks[0].train
    came = model.pretrained_head(model(batch.images).features).detach()
    strategy = LwF(teacher="pretrained", temperature=1.0)
    at_task(strategy, stream, model, 2)
    now = model.pretrained_head(model(batch.images).features)
    expected = F.kl_div(now.log_softmax(1), came.log_softmax(1), reduction="batchmean", log_target=True)
    terms = strategy.penalties(batch, model(batch.images))
    assert list(terms) == ["lwf_pretrained"]
    torch.testing.assert_close(terms["lwf_pretrained"], expected)


@pytest.mark.parametrize(
    ("weighting", "task", "distillation"), [("constant", 1, 1), ("tasks", 1, 2), ("average", 1 / 3, 2 / 3)]
)
def test_the_weights_in_the_third_task(weighting, task, distillation):
    stream = toy_stream()
    model = toy_model(stream)
    plain, weighted = LwF(weighting="constant"), LwF(weighting=weighting)
    batch = at_task(weighted, stream, model, 2)
    plain.setup(model, stream)
    plain.before_task(stream.tasks[2])
    perturbed(model)
    output = model(batch.images)
    torch.testing.assert_close(weighted.task_loss(batch, output), task * plain.task_loss(batch, output))
    expected = distillation * plain.penalties(batch, output)["lwf"]
    torch.testing.assert_close(weighted.penalties(batch, output)["lwf"], expected)


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_it_distils_in_the_other_scenarios_too(scenario):
    stream = toy_stream(scenario)
    rows = learn(LwF(), stream, toy_model(stream))
    assert all(row["loss"]["lwf"] > 0 for row in rows if row["task"] == 2)


@pytest.mark.parametrize("teacher", ["pretrained", "both"])
def test_an_explicit_pretrained_teacher_needs_a_pretrained_head(teacher):
    with pytest.raises(ConfigError, match=r"strategy\.teacher: expected auto or previous"):
        LwF(teacher=teacher).check(DIGITS, EfficientNetLite0(pretrained=False))
