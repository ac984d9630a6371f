import pytest
import torch
import torch.nn.functional as F

from cl_runner.errors import ConfigError
from cl_runner.memory import Herding
from cl_runner.models.mlp import MLP
from cl_runner.strategies import Finetune, ICaRL
from cl_runner.strategies.icarl import _cross_entropies
from cl_runner.streams.split import Split
from tests.strategies.midway import assert_resumes
from tests.toys import assert_same_with_gradients, learn, toy_model, toy_stream

SCENARIOS = ["task", "class"]


def herded(size=5):
    return Herding(size=size, per="class")


def at_task(strategy, stream, model, index):
    learn(strategy, stream, model, tasks=index)
    model.reveal(stream.tasks[index])
    strategy.before_task(stream.tasks[index])


def accuracy(strategy, stream):
    """Accuracy on all tasks, among all classes."""
    strategy.model.eval()
    with torch.no_grad():
        hits = [strategy.predict(t.test.images, t.test.task_ids).argmax(1) == t.test.labels for t in stream.tasks]
    return torch.cat(hits).double().mean().item()


def test_it_names_the_class_whose_exemplars_mean_is_nearest():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = ICaRL(memory=herded())
    learn(strategy, stream, model)
    model.eval()
    kept, images = strategy.memory.examples, torch.cat([task.test.images for task in stream.tasks])
    with torch.no_grad():
        features = F.normalize(model(kept.images).features)
        means = torch.stack([F.normalize(features[kept.labels == label].mean(0), dim=0) for label in range(6)])
        distances = torch.cdist(F.normalize(model(images).features), means)
        found = strategy.predict(images, torch.zeros(len(images), dtype=torch.int64))
    assert torch.equal(found.argmax(1), distances.argmin(1))
    torch.testing.assert_close(2 - 2 * found, distances.square(), rtol=1e-3, atol=1e-5)


def test_classes_without_exemplars_are_never_named():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = ICaRL(memory=herded())
    learn(strategy, stream, model, tasks=1)
    scores = strategy.predict(stream.tasks[0].test.images, stream.tasks[0].test.task_ids)
    assert scores[:, :2].isfinite().all()
    assert (scores[:, 2:] == -torch.inf).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_new_outputs_learn_labels_and_old_ones_the_teachers_answers(scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = ICaRL(memory=herded(), temperature=2.0)
    at_task(strategy, stream, model, 1)
    batch = stream.tasks[1].train[:3] + strategy.memory.examples[:2]
    model.eval()
    teacher = model(batch.images).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    output = model(batch.images)
    labels, answers = 0.0, 0.0
    for row in range(5):
        g = output.logits[row].sigmoid()
        new = [] if scenario == "task" and batch.task_ids[row] == 0 else [2, 3]
        for k in new:
            labels -= g[k].log() if batch.labels[row] == k else (1 - g[k]).log()
        for k in [0, 1]:
            q = torch.sigmoid(teacher[row, k] / 2)
            answers -= q * g[k].log() + (1 - q) * (1 - g[k]).log()
    assert_same_with_gradients(strategy.task_loss(batch, output), labels / 5, model)
    assert_same_with_gradients(strategy.penalties(batch, output)["icarl"], answers / 5, model)


def test_exemplars_are_among_what_is_learned():
    stream = toy_stream("class")
    strategy = ICaRL(memory=herded())
    learn(strategy, stream, toy_model(stream), tasks=2)
    data = strategy.training_data(stream.tasks[2])
    assert len(data) == 24 + 4 * 5
    assert sorted(data.labels.unique().tolist()) == [0, 1, 2, 3, 4, 5]


def test_the_means_are_those_of_the_features_as_they_are_now():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = ICaRL(memory=herded())
    learn(strategy, stream, model, tasks=1)
    before = strategy.means.clone()
    learn_on(strategy, stream, model)
    assert not torch.allclose(before[:2], strategy.means[:2])


def learn_on(strategy, stream, model):
    task = stream.tasks[1]
    model.reveal(task)
    strategy.before_task(task)
    with torch.no_grad():
        model.backbone[1].weight += 0.3 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    strategy.after_task(task)


def test_the_teacher_is_still_while_the_student_trains():
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    strategy = ICaRL(memory=herded())
    learn(strategy, stream, model)
    before = {name: value.clone() for name, value in strategy.teacher.state_dict().items()}
    model.train()
    assert not any(module.training for module in strategy.teacher.modules())
    learn_on_batches(strategy, model, stream.tasks[2].train)
    assert all(torch.equal(value, before[name]) for name, value in strategy.teacher.state_dict().items())


def learn_on_batches(strategy, model, examples):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in examples.batches(8):
        output = model(batch.images)
        (strategy.task_loss(batch, output) + strategy.penalties(batch, output)["icarl"]).backward()
        optimizer.step()


def test_it_forgets_less_than_fine_tuning():
    found = {}
    for kind in (Finetune, lambda: ICaRL(memory=herded())):
        stream = toy_stream("class")
        strategy = kind()
        learn(strategy, stream, toy_model(stream), epochs=25)
        found[type(strategy)] = accuracy(strategy, stream)
    assert found[ICaRL] > found[Finetune] + 0.2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_resumes_in_the_middle_of_a_task(scenario):
    assert_resumes(lambda: ICaRL(memory=herded()), scenario, norm=True)


def test_shared_classes_are_refused():
    with pytest.raises(ConfigError, match=r"strategy: expected stream\.scenario="):
        ICaRL(memory=herded()).check(Split(name="digits", num_tasks=5, scenario="domain"), MLP(widths=[8]))


def test_small_differences_from_the_teacher_survive_bf16():
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 10, generator=draw).bfloat16()
    student = (teacher + 0.02 * torch.randn(64, 10, generator=draw)).bfloat16().requires_grad_()
    every = torch.ones(64, 10, dtype=torch.bool)
    _cross_entropies(student, teacher.float().sigmoid(), every).backward()
    exact = (student.detach().double().sigmoid() - teacher.double().sigmoid()) / 64
    assert F.cosine_similarity(student.grad.double().flatten(), exact.flatten(), dim=0) > 0.999
