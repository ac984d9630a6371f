import torch

from cl_runner.memory import ClassBalanced
from cl_runner.strategies import GDumb
from tests.toys import learn, toy_model, toy_stream


def test_every_task_is_learned_from_the_memory_alone_which_is_balanced():
    stream = toy_stream("class")
    strategy = GDumb(memory=ClassBalanced(size=12))
    learn(strategy, stream, toy_model(stream), tasks=2)
    strategy.before_task(stream.tasks[2])
    data = strategy.training_data(stream.tasks[2])
    assert torch.bincount(data.labels).tolist() == [2] * 6
    assert len(strategy.training_data(stream.tasks[2])) == 12  # asking changes nothing


def test_every_task_starts_from_the_weights_and_statistics_that_came_and_from_a_fresh_head():
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    came = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    strategy = GDumb(memory=ClassBalanced(size=12))
    learn(strategy, stream, model, tasks=2)
    assert not torch.equal(came["1.weight"], model.backbone[1].weight)
    learned = model.head.weight[:4].clone()
    model.reveal(stream.tasks[2])
    strategy.before_task(stream.tasks[2])
    assert all(torch.equal(value, came[name]) for name, value in model.backbone.state_dict().items())
    assert (model.head.weight[:4] != learned).all()
    assert model.head.weight.abs().max() <= 8**-0.5  # as when drawn


def test_what_was_learned_before_does_not_matter():
    found = []
    for epochs in (1, 6):
        stream = toy_stream("class")
        model = toy_model(stream)
        strategy = GDumb(memory=ClassBalanced(size=100))
        learn(strategy, stream, model, tasks=1, epochs=epochs)
        model.reveal(stream.tasks[1])
        strategy.before_task(stream.tasks[1])
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_heads_of_two_seeds_never_meet():
    heads = []
    for seed in (0, 1):
        stream = toy_stream("class")
        model = toy_model(stream)
        model.seed = seed
        strategy = GDumb(memory=ClassBalanced(size=12))
        strategy.setup(model, stream)
        for task in stream.tasks[:2]:
            model.reveal(task)
            strategy.before_task(task)
            heads.append(model.head.weight[:2].clone())
    assert all(not torch.equal(one, other) for number, one in enumerate(heads) for other in heads[:number])
