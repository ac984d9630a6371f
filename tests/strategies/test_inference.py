"""Tests of inference with the model."""

from copy import deepcopy

import torch

from cl_runner.strategies import NCM
from cl_runner.strategies.inference import FeatureCache, features_of
from tests.toys import learn, toy_model, toy_stream


def test_features_are_those_of_eval_mode_and_leave_the_model_as_it_was():
    stream = toy_stream()
    model = toy_model(stream, norm=True).train()
    before = deepcopy(model.state_dict())
    images = stream.tasks[0].train.images
    found = features_of(model)(images)
    assert model.training
    assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(found, model.eval()(images).features)


def test_an_image_that_is_asked_about_again_is_not_computed_again():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = NCM()
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    strategy.setup(model, stream)
    for task in stream.tasks:
        strategy.after_task(task)
        for asked in stream.tasks:
            strategy.predict(asked.test.images, asked.test.task_ids)
    assert len(passes) == 3 + 3  # of training images, then of test images


def test_what_is_remembered_of_images_is_of_those_images():
    stream = toy_stream("class")
    strategy = NCM()
    learn(strategy, stream, toy_model(stream))
    test = stream.tasks[0].test
    images = test.images.clone()
    first = strategy.predict(images, test.task_ids)
    images.copy_(stream.tasks[1].test.images)  # the same memory, other pixels
    again = strategy.predict(images, test.task_ids)
    assert torch.equal(again, strategy.predict(stream.tasks[1].test.images, test.task_ids))
    assert not torch.equal(again, first)


def test_no_more_is_remembered_of_images_than_there_is_room_for():
    stream = toy_stream()
    model = toy_model(stream).eval()
    images = stream.tasks[0].test.images
    features = model(images).features
    one = FeatureCache(model, room=features[:1].nbytes)
    for row in (0, 1, 0, 1):
        assert torch.equal(one(images[row : row + 1]), model(images[row : row + 1]).features)
    assert len(one.known) == 1
