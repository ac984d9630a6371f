"""Compares a run stopped in the middle of a task with an uninterrupted one."""

import io

import torch

from tests.toys import toy_model, toy_stream

BATCH = 8


def outcomes(make, scenario="task", task=2, step=4, passes=2, **model):
    """Weights, then predictions, after four tasks: of an uninterrupted run, and of one stopped after `step` steps of
    `task` and resumed by another process."""
    return [_run(make, scenario, stop, passes, model) for stop in (None, (task, step))]


def _run(make, scenario, stop, passes, settings):
    stream, model, strategy, optimizer = _begun(make, scenario, settings)
    for task in stream.tasks:
        torch.manual_seed(task.index)
        model.reveal(task)
        strategy.before_task(task)
        data = strategy.training_data(task)
        order = torch.randperm(passes * len(data), generator=torch.Generator().manual_seed(task.index)) % len(data)
        model.train()
        for number, rows in enumerate(order.split(BATCH)):
            if (task.index, number) == stop:
                kept, before = _through_a_file(model, strategy, optimizer), _answers(model, strategy, stream)
                stream, model, strategy, optimizer = _begun(make, scenario, settings)
                torch.manual_seed(1234)
                model.load_state_dict(kept["model"])
                strategy.load_state_dict(kept["strategy"])
                optimizer.load_state_dict(kept["optimizer"])
                assert torch.equal(before, _answers(model, strategy, stream))
                torch.set_rng_state(kept["random"])
            _step(model, strategy, optimizer, data[rows])
        strategy.after_task(stream.tasks[task.index])
    weights = torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])
    return torch.cat([weights, _answers(model, strategy, stream)])


def _begun(make, scenario, settings):
    stream = toy_stream(scenario, num_tasks=4)
    model = toy_model(stream, **settings)
    strategy = make()
    strategy.setup(model, stream)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return stream, model, strategy, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _through_a_file(model, strategy, optimizer):
    state = {
        "model": model.state_dict(),
        "strategy": strategy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _answers(model, strategy, stream):
    """Predictions for all test images; leaves the model in train mode."""
    model.eval()
    with torch.no_grad():
        found = [strategy.predict(task.test.images, task.test.task_ids).flatten() for task in stream.tasks]
    model.train()
    return torch.cat(found)


def _step(model, strategy, optimizer, batch):
    batch = strategy.before_batch(batch)
    optimizer.zero_grad()
    output = model(batch.images)
    terms = [strategy.task_loss(batch, output), *strategy.penalties(batch, output).values()]
    torch.stack(terms).sum().backward()
    strategy.after_backward()
    optimizer.step()
    strategy.after_step(batch, output)


def assert_resumes(make, scenario="task", **settings):
    whole, resumed = outcomes(make, scenario, **settings)
    assert torch.equal(whole.nan_to_num(), resumed.nan_to_num())
