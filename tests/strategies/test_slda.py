import numpy as np
import pytest
import torch

from cl_runner.strategies import SLDA
from cl_runner.strategies.moments import Moments
from tests.toys import learn, toy_model, toy_stream


def examples(size=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (size,), generator=generator)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(size, 5, generator=generator, dtype=torch.float64) @ mixing
    return features + 3 * labels[:, None], labels


def moments(shared, parts):
    result = Moments(4, 5, shared=shared, device=torch.device("cpu"))
    for features, labels in parts:
        result.add(features, labels)
    return result


def in_parts(features, labels, *edges):
    return [
        (features[start:end], labels[start:end]) for start, end in zip((0, *edges), (*edges, len(labels)), strict=True)
    ]


@pytest.mark.parametrize("edges", [(), (1, 2, 3, 30), tuple(range(1, 60))], ids=["once", "uneven", "singly"])
def test_streaming_means_and_covariances_are_numpys(edges):
    features, labels = examples()
    single = moments(False, in_parts(features, labels, *edges))
    shared = moments(True, in_parts(features, labels, *edges))
    within = 0
    for label in range(4):
        rows = features[labels == label].numpy()
        covariance = np.cov(rows.T, bias=True)
        within += len(rows) * covariance / len(labels)
        np.testing.assert_allclose(single.means[label], rows.mean(0))
        np.testing.assert_allclose(single.covariance(label), covariance)
    np.testing.assert_allclose(single.means, shared.means)
    np.testing.assert_allclose(shared.covariance(), within)
    np.testing.assert_allclose(single.covariance(), within)


def test_the_scores_are_those_of_gaussians_of_one_covariance():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = SLDA(shrinkage=0.1)
    learn(strategy, stream, model)
    test = stream.tasks[1].test
    features = model(test.images).features.detach().double()
    covariance = 0.9 * strategy.moments.covariance() + 0.1 * torch.eye(8)
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean, covariance).log_prob(features)
            for mean in strategy.moments.means
        ],
        1,
    )
    scores = strategy.predict(test.images, test.task_ids).double()
    difference = scores - densities  # the same for all classes
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, 6), rtol=0, atol=1e-4)


def test_shrunk_all_the_way_it_is_the_nearest_mean():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = SLDA(shrinkage=1.0)
    learn(strategy, stream, model)
    test = stream.tasks[2].test
    distances = torch.cdist(model(test.images).features.detach().double(), strategy.moments.means)
    assert torch.equal(strategy.predict(test.images, test.task_ids).argmax(1), distances.argmin(1))


def test_fewer_examples_than_dimensions_need_no_shrinkage():
    stream = toy_stream("class", size=4)
    strategy = SLDA(shrinkage=0.0)
    learn(strategy, stream, toy_model(stream), tasks=1)
    test = stream.tasks[0].test
    assert strategy.predict(test.images, test.task_ids)[:, :2].isfinite().all()
