"""Small streams and models to try things on."""

from functools import partial

import torch
from torch import nn

from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from cl_runner.schedulers import constant
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Scenario, Stream, Task
from cl_runner.trainer import Trainer, Training

SHAPE = (1, 4, 4)


def toy_stream(scenario: str = "task", num_tasks: int = 3, size: int = 24, seed: int = 0) -> Stream:
    """Two classes per task, each a noisy pattern of 4 x 4 pixels: learned in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    shared = scenario == "domain"

    def task(index: int) -> Task:
        classes = (0, 1) if shared else (2 * index, 2 * index + 1)
        patterns = torch.randint(256, (2, *SHAPE), generator=generator)

        def examples(split_seed: int) -> Examples:
            draw = torch.Generator().manual_seed(1000 * seed + 10 * index + split_seed)
            which = torch.arange(size) % 2
            noise = torch.randint(-60, 61, (size, *SHAPE), generator=draw)
            images = (patterns[which] + noise).clamp(0, 255).to(torch.uint8)
            return Examples(images, torch.tensor(classes)[which], torch.full((size,), index))

        sets = {"train": examples(1), "validation": examples(2)[:0], "test": examples(3)}
        return Task(index, classes, sets.__getitem__)

    tasks = [task(index) for index in range(num_tasks)]
    return Stream(Scenario(scenario), tasks, 2 if shared else 2 * num_tasks, SHAPE, None, None)


def toy_model(
    stream: Stream,
    *,
    pretrained: bool = False,
    norm: bool = False,
    frozen: bool = False,
    seed: int = 0,
    active_logits=None,
) -> Model:
    """One hidden layer of 8; with `pretrained`, a frozen head of 5 outputs beside the new one; with `frozen`, another
    layer in front that does not learn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
        front: list[nn.Module] = [nn.Linear(16, 16).requires_grad_(False)] if frozen else []
        backbone = nn.Sequential(nn.Flatten(), *front, nn.Linear(16, 8), *middle, nn.ReLU(), nn.Dropout(0.0))
        head = nn.Linear(8, 5) if pretrained else None
        return Model(Preprocess(1), backbone, 8, stream, active_logits, pretrained_head=head, seed=seed)


def toy_training(strategy: Strategy, stream: Stream, model: Model, **settings) -> tuple[Training, list[dict]]:
    """A training that is ready to learn, and its journal."""
    rows: list[dict] = []
    trainer = Trainer(**{"epochs": 4, "batch_size": 8, **settings})
    strategy.setup(model, stream)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    training = Training(trainer, model, strategy, optimizer, constant, rows.append)
    return training, rows


def assert_same_with_gradients(found: torch.Tensor, expected: torch.Tensor, model: Model) -> None:
    """The two scalars are the same function of the weights, as far as their values and gradients here say."""
    torch.testing.assert_close(found, expected.to(found))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    pairs = zip(*(torch.autograd.grad(value, parameters, **options) for value in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in torch.autograd.grad(expected, parameters, **options))


def learn(strategy: Strategy, stream: Stream, model: Model, tasks: int | None = None, **settings) -> list[dict]:
    """Learn the first `tasks` tasks, as a run does. Returns the journal."""
    training, rows = toy_training(strategy, stream, model, **settings)
    for task in stream.tasks[:tasks]:
        torch.manual_seed(task.index)
        model.reveal(task)
        if strategy.offline and task.index < len(stream) - 1:
            continue
        strategy.before_task(task)
        data = strategy.training_data(task)
        if len(data):
            training.learn(task, data)
        strategy.after_task(task)
    return rows
