import pytest
import torch
import torch.nn.functional as F

from cl_runner.strategies import NCM, FeCAM
from tests.toys import learn, toy_model, toy_stream


def learned(strategy, size=24):
    stream = toy_stream("class", size=size)
    model = toy_model(stream)
    learn(strategy, stream, model)
    images = torch.cat([task.test.images for task in stream.tasks])
    train = torch.cat([task.train.images for task in stream.tasks])
    labels = torch.cat([task.train.labels for task in stream.tasks])
    with torch.no_grad():
        features = [model(part).features.double() for part in (train, images)]
    return strategy.predict(images, torch.zeros(len(images), dtype=torch.long)), *features, labels


def test_with_the_identity_for_covariance_it_is_the_nearest_mean():
    identity = FeCAM(power=1.0, diagonal_shrinkage=1e9, off_diagonal_shrinkage=0.0, unit_length=None)
    fecam, ncm = learned(identity)[0], learned(NCM(distance="euclidean"))[0]
    torch.testing.assert_close(-(-fecam).sqrt(), ncm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("covariance", ["class", "shared"])
def test_the_scores_are_mahalanobis_distances_after_the_papers_four_transformations(covariance):
    scores, train, test, labels = learned(FeCAM(covariance=covariance, off_diagonal_shrinkage=0.5), size=60)
    train, test = train.sqrt(), test.sqrt()  # after a ReLU nothing is negative
    residuals = torch.cat([train[labels == k] - train[labels == k].mean(0) for k in range(6)])
    for label in range(6):
        rows = train[labels == label]
        matrix = torch.cov((rows if covariance == "class" else residuals).T, correction=0)
        off = ~torch.eye(8, dtype=torch.bool)
        matrix = matrix + matrix.diagonal().mean() * torch.eye(8) + 0.5 * matrix[off].mean() * off
        deviation = matrix.diagonal().sqrt()
        inverse = torch.linalg.inv(matrix / torch.outer(deviation, deviation))
        delta = F.normalize(test) - F.normalize(rows.mean(0), dim=0)
        expected = -torch.einsum("nd,de,ne->n", delta, inverse, delta)
        torch.testing.assert_close(scores[:, label].double(), expected, rtol=1e-4, atol=1e-6)


def test_each_class_has_a_covariance_of_its_own():
    strategy = FeCAM()
    learned(strategy)
    covariances = [strategy.moments.covariance(label) for label in range(6)]
    assert all(not torch.allclose(covariances[0], other) for other in covariances[1:])


def test_negative_features_keep_their_sign():
    strategy = FeCAM(power=0.5)
    torch.testing.assert_close(strategy._transformed(torch.tensor([-4.0, 0.0, 9.0])), torch.tensor([-2.0, 0.0, 3.0]))


def test_features_may_be_brought_to_length_one_before_all_else():
    strategy = FeCAM(power=1.0, unit_length="first")
    _, train, _, labels = learned(strategy)
    expected = torch.stack([F.normalize(train[labels == label]).mean(0) for label in range(6)])
    torch.testing.assert_close(strategy.moments.means, expected)


def test_a_class_of_one_image_is_not_the_answer_to_everything():
    strategy = FeCAM()
    learned(strategy)
    images = strategy.stream.tasks[0].train.images
    with torch.no_grad():
        features = strategy.model(images).features.double()
    before = strategy.predict(images, torch.zeros(len(images), dtype=torch.long))
    strategy.counts[5] = 0.0
    strategy.moments.means[5], strategy.moments.scatter[5] = 0.0, 0.0
    strategy.gather(-features[:1], torch.tensor([5]))  # far from all
    strategy.classifier = None
    after = strategy.predict(images, torch.zeros(len(images), dtype=torch.long))
    assert torch.equal(after[:, :5], before[:, :5])
    assert (after.argmax(1) != 5).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_without_shrinkage_a_singular_covariance_still_gives_finite_scores(normalize):
    strategy = FeCAM(diagonal_shrinkage=0.0, off_diagonal_shrinkage=0.0, normalize=normalize)
    assert learned(strategy, size=4)[0].isfinite().all()
