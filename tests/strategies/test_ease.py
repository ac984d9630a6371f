import pytest
import torch
import torch.nn.functional as F

from cl_runner.strategies import EASE
from cl_runner.strategies.subspaces import Subspaces
from tests.toys import learn, toy_stream
from tests.vits import toy_vit_model

CLASSES = [(0, 1), (2, 3), (4, 5)]


def method(**settings):
    return EASE(width=8, scale=1.0, **settings)


def filled(tasks=3, classes=CLASSES):
    """Subspaces after `tasks` tasks: features of their classes in every space so far."""
    spaces = Subspaces(classes, 6, 5, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for task in range(tasks):
        labels = torch.tensor(classes[task]).repeat(4)
        for space in range(task + 1):
            spaces.add(space, torch.randn(len(labels), 5, generator=generator, dtype=torch.float64), labels)
    return spaces


def test_adapters_of_earlier_tasks_stay():
    stream = toy_stream()
    learn(first := method(), stream, toy_vit_model(stream), tasks=1)
    learn(last := method(), stream, toy_vit_model(stream))
    assert len(last.learned) == 3
    assert all(torch.equal(value, last.learned[0][name]) for name, value in first.learned[0].items())
    assert all(value.any() for name, value in first.learned[0].items() if name.endswith("up.weight"))
    assert not torch.equal(*(last.learned[task]["adapters.0.up.weight"] for task in (0, 1)))


def test_each_task_starts_from_adapters_that_add_nothing():
    stream = toy_stream()
    model = toy_vit_model(stream)
    images = stream.tasks[0].test.images
    before = model.eval()(images).features
    strategy = method()
    learn(strategy, stream, model, tasks=1)
    assert not torch.allclose(model.eval()(images).features, before)
    strategy.before_task(stream.tasks[1])
    assert torch.equal(model.eval()(images).features, before)


def test_a_class_is_measured_in_the_subspaces_of_its_task_and_of_those_before():
    stream = toy_stream("class")
    model = toy_vit_model(stream)
    strategy = method()
    learn(strategy, stream, model)
    counts = strategy.subspaces.counts
    assert counts.tolist() == [[12.0] * 6, [0.0] * 2 + [12.0] * 4, [0.0] * 4 + [12.0] * 2]
    model.load_state_dict(strategy.learned[1], strict=False)
    last = stream.tasks[2].train
    features = model.eval()(last.images).features.detach().double()
    means = strategy.subspaces.means(3)
    torch.testing.assert_close(means[1, 4], features[last.labels == 4].mean(0))


def test_an_old_class_in_a_new_subspace_is_made_up_from_the_new_classes_that_it_resembles():
    spaces = filled()
    means = spaces.means(3)
    alike = F.normalize(means[0, [0, 1]]) @ F.normalize(means[0, [4, 5]]).T
    torch.testing.assert_close(means[2, [0, 1]], alike.softmax(1) @ means[2, [4, 5]])
    alike = F.normalize(means[1, [2, 3]]) @ F.normalize(means[1, [4, 5]]).T
    torch.testing.assert_close(means[2, [2, 3]], alike.softmax(1) @ means[2, [4, 5]])
    measured = spaces.sums[0] / spaces.counts[0][:, None]
    torch.testing.assert_close(means[0], measured)  # all classes came later: nothing is synthesised


def test_the_score_is_a_mean_of_cosines_in_which_the_classs_own_subspace_counts_most():
    spaces = filled()
    features = list(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    scores, means = spaces.scores(features, alpha=0.3), spaces.means(3)
    for label in range(6):
        shares = [1.0 if space == label // 2 else 0.3 for space in range(3)]
        expected = sum(
            share * F.cosine_similarity(features[space], means[space, label][None])
            for space, share in enumerate(shares)
        )
        torch.testing.assert_close(scores[:, label], expected / 1.6)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_alpha_weighs_other_tasks_subspaces_in_what_it_predicts(alpha):
    stream = toy_stream("class")
    model = toy_vit_model(stream)
    learn(strategy := method(alpha=alpha), stream, model)
    test = stream.tasks[1].test
    features = []
    for weights in strategy.learned:
        model.load_state_dict(weights, strict=False)
        features.append(model.eval()(test.images).features.detach())
    found = strategy.predict(test.images, test.task_ids)
    torch.testing.assert_close(found, strategy.subspaces.scores(features, alpha).float())
    assert not torch.allclose(found, strategy.subspaces.scores(features, 1.0).float())


def test_an_adapter_adds_its_scaled_output_to_the_mlps():
    stream = toy_stream()
    model = toy_vit_model(stream)
    strategy = EASE(width=8, scale=0.25)
    strategy.setup(model, stream)
    mlp, adapter = model.backbone.blocks[1].mlp, strategy.adapters[1]
    torch.nn.init.normal_(adapter.up.weight)
    tokens = torch.randn(2, 5, 32)
    beside = adapter.up(adapter.down(tokens).relu())
    torch.testing.assert_close(mlp(tokens), mlp.fc2(mlp.act(mlp.fc1(tokens))) + 0.25 * beside)


def test_a_class_that_comes_back_adds_to_its_statistics_and_has_two_subspaces_of_its_own():
    stream = toy_stream("domain")
    strategy = method()
    learn(strategy, stream, toy_vit_model(stream))
    assert strategy.subspaces.counts.tolist() == [[36.0, 36.0], [24.0, 24.0], [12.0, 12.0]]
    spaces = filled(classes=[(0, 1), (2, 3), (0, 4)])
    features = list(torch.randn(3, 4, 5, dtype=torch.float64))
    measured = spaces.sums[2, 0] / spaces.counts[2, 0]
    torch.testing.assert_close(spaces.means(3)[2, 0], measured)  # not synthesised: the class was there
    difference = 3 * spaces.scores(features, 1.0) - 2 * spaces.scores(features, 0.0)
    expected = F.cosine_similarity(features[1], spaces.means(3)[1, 0][None])  # task 1 alone is not its own
    torch.testing.assert_close(difference[:, 0], expected)


def test_a_class_that_came_twice_is_not_named_for_that():
    spaces = Subspaces([(0, 1), (2, 3), (0, 4)], 6, 5, torch.device("cpu"))
    for space in range(3):
        for task in range(space, 3):
            labels = torch.tensor(spaces.classes[task])
            alike = torch.ones(2, 5, dtype=torch.float64) + torch.eye(6, 5, dtype=torch.float64)[labels]
            spaces.add(space, alike, labels)
    looks_like_3 = (1 + torch.eye(6, 5, dtype=torch.float64)[[3]]).expand(3, 1, 5)
    assert spaces.scores(list(looks_like_3), 0.1).argmax() == 3


@pytest.mark.parametrize("learned", [0, 2])
def test_a_class_that_has_not_come_is_never_named(learned):
    stream = toy_stream("class")
    strategy = method()
    model = toy_vit_model(stream)
    learn(strategy, stream, model, tasks=learned)
    test = stream.tasks[0].test
    scores = strategy.predict(test.images, test.task_ids)
    assert (scores[:, : 2 * learned] > -torch.inf).all()
    assert (scores[:, 2 * learned :] == -torch.inf).all()
