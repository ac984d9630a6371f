import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.memory import Herding
from cl_runner.models.mlp import MLP
from cl_runner.models.model import Output
from cl_runner.randomness import task_seed
from cl_runner.strategies import BiC, Finetune
from cl_runner.streams.base import Task
from cl_runner.streams.split import Split
from tests.strategies.midway import assert_resumes
from tests.strategies.test_icarl import accuracy, at_task
from tests.toys import learn, toy_model, toy_stream


def bic(size=6, **settings):
    return BiC(memory=Herding(size=size, per="class"), **settings)


def test_rows_of_all_classes_are_held_out_as_many_of_each_and_never_learned():
    stream = toy_stream("class")
    strategy = bic(held_out=0.34)
    learn(strategy, stream, toy_model(stream), tasks=2)
    learned, apart = strategy._parts(stream.tasks[2])
    assert torch.equal(strategy.training_data(stream.tasks[2]).images, learned.images)
    assert apart.labels.bincount().tolist() == [2] * 6
    assert learned.labels.bincount().tolist() == [4, 4, 4, 4, 10, 10]
    rows = {tuple(image.flatten().tolist()) for image in learned.images}
    assert not any(tuple(image.flatten().tolist()) in rows for image in apart.images)


def test_the_held_out_rows_are_not_the_first_in_the_order_that_the_trainer_shuffles_by():
    stream = toy_stream("class", size=200)
    strategy = bic(size=60, held_out=0.34)
    learn(strategy, stream, toy_model(stream), tasks=1, epochs=1)
    task = stream.tasks[1]
    fresh = task.train
    first = fresh[torch.randperm(len(fresh), generator=torch.Generator().manual_seed(task_seed(0, task.index)))]
    _, apart = strategy._parts(task)
    for label in task.classes:
        held_out = apart.images[apart.labels == label]
        in_front = first.images[first.labels == label][: len(held_out)]
        assert len(held_out) == 20
        assert not all((in_front == image).flatten(1).all(1).any() for image in held_out)


def test_nothing_is_held_out_and_nothing_corrected_where_a_class_has_a_single_exemplar(caplog):
    stream = toy_stream("class")
    strategy = bic(size=1)
    learn(strategy, stream, toy_model(stream))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["bic"] * (len(stream) - 1)
    learned, apart = strategy._parts(stream.tasks[2])
    assert (len(learned), len(apart)) == (len(stream.tasks[2].train) + 6, 0)
    assert (strategy.scale.unique().tolist(), strategy.shift.unique().tolist()) == ([1.0], [0.0])


def test_what_is_learned_does_not_change_when_it_is_asked_for_again():
    stream = toy_stream("class")
    strategy = bic()
    learn(strategy, stream, toy_model(stream), tasks=1)
    one, other = strategy.training_data(stream.tasks[1]), strategy.training_data(stream.tasks[1])
    assert torch.equal(one.images, other.images)


def test_the_loss_is_weighed_by_the_share_of_old_classes():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = bic(temperature=3.0)
    at_task(strategy, stream, model, 2)  # four old classes, two new ones
    batch = stream.tasks[2].train
    model.eval()
    corrected = (model(batch.images).logits * strategy.scale + strategy.shift).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    output = model(batch.images)
    wanted = (corrected[:, :4] / 3).softmax(1)
    distillation = -(wanted * (output.logits[:, :4] / 3).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(strategy.penalties(batch, output)["bic"], 2 / 3 * distillation)
    torch.testing.assert_close(strategy.task_loss(batch, output), F.cross_entropy(output.logits, batch.labels) / 3)


def test_the_correction_is_the_best_scale_and_shift_of_the_new_logits():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = bic(held_out=0.5)
    learn(strategy, stream, model, tasks=1)
    task = stream.tasks[1]
    model.reveal(task)
    strategy.before_task(task)
    with torch.no_grad():
        model.head.bias[2:4] += 3  # a bias towards the new classes
    _, apart = strategy._parts(task)
    strategy.after_task(task)
    model.eval()
    logits = model(apart.images).logits[:, :4].detach()

    def loss(alpha, beta):
        corrected = torch.cat([logits[:, :2], alpha * logits[:, 2:] + beta], 1)
        prior = ((alpha - 1) ** 2 + beta**2) / (2 * len(apart))
        return F.cross_entropy(corrected, apart.labels).item() + prior

    alpha, beta = strategy.scale[2].item(), strategy.shift[2].item()
    assert loss(alpha, beta) < loss(1.0, 0.0) - 0.1
    assert all(loss(alpha, beta) <= loss(alpha + a, beta + b) for a in (-0.05, 0, 0.05) for b in (-0.05, 0, 0.05))
    assert strategy.scale[[0, 1, 4, 5]].tolist() == [1] * 4
    assert strategy.shift[[0, 1, 4, 5]].tolist() == [0] * 4
    images = task.test.images
    expected = model(images).logits * strategy.scale + strategy.shift
    torch.testing.assert_close(strategy.predict(images, task.test.task_ids), expected)


def test_it_forgets_less_than_fine_tuning():
    found = {}
    for kind in (Finetune, bic):
        stream = toy_stream("class")
        strategy = kind()
        learn(strategy, stream, toy_model(stream), epochs=25)
        found[type(strategy)] = accuracy(strategy, stream)
    assert found[BiC] > found[Finetune] + 0.2


def test_it_resumes_in_the_middle_of_a_task():
    assert_resumes(bic, "class", norm=True)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_it_is_refused_where_no_old_class_stands_beside_a_new_one(scenario):
    with pytest.raises(ConfigError, match=r"strategy: expected stream\.scenario=class"):
        bic().check(Split(name="digits", num_tasks=5, scenario=scenario), MLP(widths=[8]))


def test_a_class_that_comes_back_is_held_out_once_from_its_exemplars():
    stream = toy_stream("class")
    strategy = bic(held_out=0.34)
    learn(strategy, stream, toy_model(stream), tasks=2)
    again, new = stream.tasks[1].train, stream.tasks[2].train
    task = Task(2, (2, 3, 4, 5), lambda split: again + new)
    learned, apart = strategy._parts(task)
    assert apart.labels.bincount().tolist() == [2] * 6
    assert learned.labels.bincount().tolist() == [4, 4, 16, 16, 10, 10]


def test_nothing_is_corrected_in_a_task_without_new_classes(caplog):
    stream = toy_stream("class")
    strategy = bic()
    learn(strategy, stream, toy_model(stream), tasks=2)
    back = Task(2, (2, 3), lambda split: stream.tasks[1].train)
    strategy.before_task(back)
    strategy.after_task(back)
    assert (strategy.scale.unique().tolist(), strategy.shift.unique().tolist()) == ([1.0], [0.0])
    assert not caplog.records


def test_small_differences_from_the_teacher_survive_bf16():
    stream = toy_stream("class")
    strategy = bic()
    at_task(strategy, stream, toy_model(stream), 1)
    strategy.scale, strategy.shift = torch.ones(6), torch.zeros(6)
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 6, generator=draw).bfloat16()
    student = (teacher + 0.02 * torch.randn(64, 6, generator=draw)).bfloat16().requires_grad_()
    strategy.teacher_output = lambda output: Output(teacher, teacher, teacher)
    strategy.penalties(stream.tasks[1].train, Output(student, student, student))["bic"].backward()
    one, other = ((logits.detach().double()[:, :2] / 2).softmax(1) for logits in (student, teacher))
    assert F.cosine_similarity(student.grad[:, :2].double().flatten(), (one - other).flatten(), dim=0) > 0.999
