import math
from functools import partial

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.losses import NonFiniteLossError
from cl_runner.models.heads import keep_unreached_rows
from cl_runner.strategies import L2, Combined, Finetune, Independent, Joint
from cl_runner.trainer import FirstTask, Trainer
from tests.toys import learn, toy_model, toy_stream, toy_training


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_learning_is_the_loop_that_anyone_would_write():
    stream = toy_stream()
    model, twin = toy_model(stream), toy_model(stream)
    learn(Finetune(), stream, model, tasks=1, epochs=2)

    task = stream.tasks[0]
    twin.reveal(task)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        order = torch.randperm(24, generator=generator)
        for start in range(0, 24, 8):
            rows = order[start : start + 8]
            logits = twin(task.train.images[rows]).logits[:, :2]
            loss = torch.nn.functional.cross_entropy(logits, task.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[name])


def test_the_budget_in_epochs_keeps_the_short_last_batch():
    rows = learn(Finetune(), toy_stream(size=20), toy_model(toy_stream()), tasks=1, epochs=3, log_every=1)
    assert len(rows) == 9
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_budget_in_iterations_wins_and_drops_it():
    stream = toy_stream(size=20)
    seen = []

    class Watching(Finetune):
        def after_step(self, batch, output):
            seen.append(len(batch))

    learn(Watching(), stream, toy_model(stream), tasks=1, epochs=3, iterations=5)
    assert seen == [8] * 5


def test_the_first_task_may_have_a_budget_an_optimizer_and_a_schedule_of_its_own():
    from cl_runner.schedulers import step

    stream = toy_stream()
    own = FirstTask(epochs=1, optimizer={"lr": 0.2, "weight_decay": 0.5}, scheduler={"milestones": [0.34]})
    training, rows = toy_training(Finetune(), stream, toy_model(stream), epochs=2, first_task=own, log_every=1)
    training.make_scheduler = partial(step, milestones=[0.5], gamma=0.1)
    decays = []
    for task in stream.tasks[:2]:
        training.model.reveal(task)
        training.learn(task, task.train)
        decays.append(training.optimizer.param_groups[0]["weight_decay"])
    rates = [[row["lr"] for row in rows if row["task"] == task] for task in range(2)]
    assert rates[0] == pytest.approx([0.2, 0.02, 0.02])
    assert rates[1] == pytest.approx([0.1] * 3 + [0.01] * 3)
    assert decays == [0.5, 0.0]


def test_the_first_tasks_own_epochs_win_over_everyones_iterations():
    stream = toy_stream()
    rows = learn(Finetune(), stream, toy_model(stream), iterations=5, first_task=FirstTask(epochs=1), tasks=2)
    assert [row["task_steps"] for row in rows if row["task_step"] == row["task_steps"]] == [3, 5]


def test_an_optimizer_of_its_own_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"trainer\.optimizer_state: expected reset where"):
        Trainer(optimizer_state="keep", first_task=FirstTask(optimizer={"lr": 0.1}))


def test_a_batch_larger_than_the_data_is_no_endless_loop():
    stream = toy_stream()
    rows = learn(Finetune(), stream, toy_model(stream), tasks=1, batch_size=100, iterations=3)
    assert rows[-1]["task_step"] == 3


def test_accumulation_changes_nothing_but_the_memory():
    results = []
    for accumulate in (1, 3):
        stream = toy_stream()
        model = toy_model(stream)
        rows = learn(L2(strength=0.1), stream, model, accumulate=accumulate, log_every=1)
        results.append((weights(model), rows[-1]["loss"]))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_after_step_sees_the_outputs_of_the_whole_batch_when_accumulating():
    stream = toy_stream()

    class Watching(Finetune):
        def after_step(self, batch, output):
            assert len(output.logits) == len(output.features) == len(output.inputs) == len(batch)

    learn(Watching(), stream, toy_model(stream), accumulate=3)


def test_accumulating_more_than_the_batch_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.accumulate: expected at most batch_size=4"):
        Trainer(batch_size=4, accumulate=5)


def test_gradients_are_clipped_to_the_norm():
    stream = toy_stream()
    norms = []

    class Watching(Finetune):
        def after_step(self, batch, output):
            norms.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm())

    learn(Watching(), stream, toy_model(stream), clip_norm=1e-3)
    assert max(norms) <= 1.001e-3


def test_the_optimizers_state_starts_empty_in_each_task_or_is_kept():
    for kept in ("reset", "keep"):
        stream = toy_stream()
        training, _ = toy_training(Finetune(), stream, toy_model(stream), optimizer_state=kept)
        optimizers = []
        for task in stream.tasks:
            training.model.reveal(task)
            training.learn(task, task.train)
            optimizers.append(training.optimizer)
        assert (optimizers[0] is optimizers[2]) == (kept == "keep")


@pytest.mark.parametrize("kind", [Independent, partial(Combined, parts={"independent": Independent()})])
def test_a_kept_optimizer_starts_empty_where_a_method_restarts_from_other_weights(kind, caplog):
    stream = toy_stream()
    training, _ = toy_training(kind(), stream, toy_model(stream), optimizer_state="keep")
    optimizers = []
    for task in stream.tasks:
        training.model.reveal(task)
        training.learn(task, task.train)
        optimizers.append(training.optimizer)
        assert "optimizer" not in training.state_dict()
    assert len({id(optimizer) for optimizer in optimizers}) == 3
    assert "trainer.optimizer_state: reset, since " in caplog.text


def test_a_first_task_of_its_own_is_said_to_be_unused_where_all_are_learned_at_once(caplog):
    stream = toy_stream()
    toy_training(Finetune(), stream, toy_model(stream), first_task=FirstTask(epochs=2))
    toy_training(Joint(), stream, toy_model(stream))
    alone = toy_stream(num_tasks=1)
    toy_training(Joint(), alone, toy_model(alone), first_task=FirstTask(epochs=2))
    assert not caplog.records
    toy_training(Joint(), stream, toy_model(stream), first_task=FirstTask(epochs=2))
    assert "trainer.first_task: unused, since Joint learns all tasks at once" in caplog.text


def test_a_row_of_the_journal_is_the_mean_over_its_steps():
    every = learn(Finetune(), toy_stream(), toy_model(toy_stream()), tasks=1, log_every=1)
    third = learn(Finetune(), toy_stream(), toy_model(toy_stream()), tasks=1, log_every=3)
    assert len(every) == 12
    assert len(third) == 4
    assert third[0]["loss"]["task"] == pytest.approx(sum(row["loss"]["task"] for row in every[:3]) / 3, rel=1e-5)
    assert [row["step"] for row in third] == [3, 6, 9, 12]


def test_the_last_steps_of_a_task_are_in_the_journal_too():
    rows = learn(Finetune(), toy_stream(), toy_model(toy_stream()), tasks=1, log_every=5)
    assert [row["task_step"] for row in rows] == [5, 10, 12]


def test_every_term_is_named_and_they_add_up():
    (row, *_) = learn(L2(), toy_stream(), toy_model(toy_stream()), tasks=1)
    assert list(row["loss"]) == ["task", "l2", "total"]
    assert row["loss"]["total"] == pytest.approx(row["loss"]["task"] + row["loss"]["l2"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named():
    class Broken(Finetune):
        def penalties(self, batch, output):
            return {"fine": torch.tensor(1.0), "broken": torch.tensor(math.inf)}

    with pytest.raises(NonFiniteLossError, match=r"task 0, at step 10 .*: broken=inf;") as error:
        learn(Broken(), toy_stream(), toy_model(toy_stream()), log_every=10)
    assert "fine" not in str(error.value)


def test_the_rate_is_stepped_with_every_batch():
    from cl_runner.schedulers import cosine, step

    stream = toy_stream()
    training, rows = toy_training(Finetune(), stream, toy_model(stream), log_every=1)
    for scheduler, rates in (
        (partial(step, milestones=[0.5], gamma=0.1), [0.1] * 6 + [0.01] * 6),
        (partial(step, milestones=[0.01], gamma=0.1), [0.1] + [0.01] * 11),
        (cosine, [0.05 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]),
    ):
        rows.clear()
        training.make_scheduler = scheduler
        training.model.reveal(stream.tasks[0])
        training.learn(stream.tasks[0], stream.tasks[0].train)
        assert [row["lr"] for row in rows] == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_a_kept_optimizer_starts_each_task_at_its_own_rate(name):
    from cl_runner import schedulers

    make = {"step": partial(schedulers.step, milestones=[0.5])}.get(name) or getattr(schedulers, name)
    stream = toy_stream()
    training, rows = toy_training(Finetune(), stream, toy_model(stream), log_every=1, optimizer_state="keep")
    training.make_scheduler = make
    for task in stream.tasks:
        training.model.reveal(task)
        training.learn(task, task.train)
    rates = [[row["lr"] for row in rows if row["task"] == task] for task in range(3)]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] == pytest.approx(rates[2])
    assert rates[2][0] == pytest.approx(0.1)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_no_batch_is_a_single_example(accumulate):
    stream = toy_stream(size=25)  # three batches of eight, and one over
    seen = []

    class Watching(Finetune):
        def penalties(self, batch, output):
            seen.append(len(batch))
            return {}

    rows = learn(
        Watching(), stream, toy_model(stream, norm=True), tasks=1, epochs=2, log_every=1, accumulate=accumulate
    )
    assert min(seen) > 1
    assert sum(seen) == 50
    assert len(rows) == rows[-1]["task_steps"] == 6


def test_bf16_autocast_computes_in_bf16_and_keeps_fp32_weights():
    seen = []

    class Watching(Finetune):
        def after_step(self, batch, output):
            seen.append(output.logits.dtype)

    stream = toy_stream()
    model = toy_model(stream)
    learn(Watching(), stream, model, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_rows_that_no_loss_reaches_do_not_move(decay):
    stream = toy_stream()
    model = toy_model(stream)
    training, _ = toy_training(Finetune(), stream, model)
    training.make_optimizer = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=decay)
    for task in stream.tasks[:2]:
        before = model.head.weight.detach().clone()
        model.reveal(task)
        training.learn(task, task.train)
        others = [row for row in range(6) if row not in task.classes and row not in (2, 3)]
        assert torch.equal(before[others], model.head.weight[others])
        assert not torch.equal(before[list(task.classes)], model.head.weight[list(task.classes)])


def test_a_reached_row_still_decays():
    head = torch.nn.Linear(3, 2)
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(head.state_dict())
    for layer in (head, twin):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        if layer is head:
            keep_unreached_rows(head, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3))[:, 0].sum().backward()
            optimizer.step()
    assert torch.equal(head.weight[0], twin.weight[0])
    assert not torch.equal(head.weight[1], twin.weight[1])
