import numpy as np
import pytest
import torch

from cl_runner.strategies import RanPAC
from cl_runner.strategies.ridge import RIDGES, best_ridge
from tests.toys import learn, toy_model, toy_stream


def whole(stream, model):
    images = torch.cat([task.train.images for task in stream.tasks])
    labels = torch.cat([task.train.labels for task in stream.tasks])
    return model(images).features.detach().double(), torch.eye(6, dtype=torch.float64)[labels]


@pytest.mark.parametrize("projection", [None, 16, 200])
def test_streaming_equals_one_ridge_regression_on_all_examples(projection):
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = RanPAC(projection=projection, ridge=0.3)
    learn(strategy, stream, model)
    features, targets = whole(stream, model)
    test = stream.tasks[1].test
    queries = model(test.images).features.detach().double()
    if projection:
        features, queries = ((each @ strategy.projection).relu() for each in (features, queries))
    # Ridge regression as least squares with the additional examples sqrt(ridge) I: nothing is squared.
    padded = np.vstack([features, np.sqrt(0.3) * np.eye(features.shape[1])])
    zeros = np.zeros((features.shape[1], 6))
    weight = np.linalg.lstsq(padded, np.vstack([targets, zeros]), rcond=None)[0]
    expected = torch.from_numpy(queries.numpy() @ weight).float()
    torch.testing.assert_close(strategy.predict(test.images, test.task_ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dimensions", [8, 200], ids=["more examples than dimensions", "fewer"])
def test_the_ridge_is_the_one_with_the_least_error_on_a_fifth_of_the_examples(dimensions):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, dimensions, generator=generator, dtype=torch.float64)
    targets = inputs[:, :3] + 2 * torch.randn(60, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(3)
    chosen = best_ridge(inputs, targets)
    torch.manual_seed(3)
    held, fitted = torch.randperm(60).split([12, 48])
    errors = {}
    for ridge in RIDGES:
        eye = torch.eye(dimensions, dtype=torch.float64)
        weight = torch.linalg.solve(inputs[fitted].T @ inputs[fitted] + ridge * eye, inputs[fitted].T @ targets[fitted])
        errors[ridge] = (inputs[held] @ weight - targets[held]).square().sum().item()
    assert chosen == min(errors, key=lambda ridge: errors[ridge])
    assert RIDGES[0] < chosen < RIDGES[-1]


def test_the_ridge_is_chosen_for_the_projected_features():
    stream = toy_stream("class", size=40)
    model = toy_model(stream)
    strategy = RanPAC(projection=300)  # of many dimensions, whose ridge is a larger one
    strategy.setup(model, stream)
    task = stream.tasks[0]
    torch.manual_seed(1)
    strategy.after_task(task)
    features = model.eval()(task.train.images).features.detach().double()
    targets = torch.eye(6, dtype=torch.float64)[task.train.labels]
    torch.manual_seed(1)
    assert strategy.ridge == best_ridge((features @ strategy.projection).relu(), targets)
    torch.manual_seed(1)
    assert strategy.ridge != best_ridge(features, targets)


def test_a_ridge_that_leaves_the_problem_singular_is_not_chosen():
    inputs = torch.ones(20, 4, dtype=torch.float64) * 1e6
    assert best_ridge(inputs, inputs[:, :2]) > 1e-8
    assert best_ridge(inputs.T.contiguous(), inputs.T[:, :2]) > 1e-8


def test_the_projection_is_random_rectified_and_stays():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = RanPAC(projection=500)
    strategy.setup(model, stream)
    before = strategy.projection.clone()
    for task in stream.tasks:
        strategy.after_task(task)
    assert torch.equal(strategy.projection, before)
    assert before.shape == (8, 500)
    assert before.std().item() == pytest.approx(1, abs=0.05)
    assert (strategy.projected(torch.randn(20, 8).double()) >= 0).all()


def test_it_reports_the_ridge():
    stream = toy_stream("class")
    strategy = RanPAC(projection=32)
    learn(strategy, stream, toy_model(stream))
    assert strategy.report() == {"ranpac_ridge": strategy.ridge}
    assert strategy.ridge in RIDGES


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_task_of_few_examples_is_enough(size):
    stream = toy_stream("class", size=size)
    strategy = RanPAC(projection=16)
    learn(strategy, stream, toy_model(stream), tasks=2)
    assert strategy.ridge in RIDGES
