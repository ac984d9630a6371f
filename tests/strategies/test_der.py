import pytest
import torch
import torch.nn.functional as F

from cl_runner.memory import Reservoir
from cl_runner.strategies import DER, DERpp, Finetune
from tests.toys import learn, toy_model, toy_stream, toy_training


def in_second_task(strategy, scenario="class", active_logits=None):
    stream = toy_stream(scenario)
    model = toy_model(stream, active_logits=active_logits)
    learn(strategy, stream, model, tasks=1)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    return stream.tasks[1], model


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("make", [lambda m: DER(memory=m, alpha=0.0), lambda m: DERpp(memory=m, alpha=0.0, beta=0.0)])
def test_with_weights_of_zero_it_is_fine_tuning(make, scenario):
    stream = toy_stream(scenario)
    plain, dark = toy_model(stream), toy_model(stream)
    learn(Finetune(), stream, plain)
    learn(make(Reservoir(size=30)), stream, dark)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, dark.state_dict()[name])


def test_the_logits_are_those_of_the_model_when_the_rows_were_stored():
    stream = toy_stream("domain")
    model = toy_model(stream)
    strategy = DER(memory=Reservoir(size=100))
    training, _ = toy_training(strategy, stream, model)
    model.reveal(stream.tasks[0])
    training.optimizer = training._new_optimizer({})
    training.scheduler = training.make_scheduler(optimizer=training.optimizer, steps=9)
    answers = []
    for batch in stream.tasks[0].train.batches(8):
        answers.append(model(batch.images).logits.detach())
        training.step(batch)
    stored = strategy.memory.examples
    assert torch.equal(stored.images, stream.tasks[0].train.images)  # the memory has room for all, so no row moves
    torch.testing.assert_close(stored.extras["logits"], torch.cat(answers))


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_the_penalty_is_alpha_times_the_mean_squared_error_of_the_logits(alpha):
    strategy = DER(memory=Reservoir(size=30), alpha=alpha, replay_batch_size=5)
    task, model = in_second_task(strategy, "domain")
    batch = strategy.before_batch(task.train[:8])
    output = model(batch.images)
    by_hand = alpha * F.mse_loss(output.logits[8:], batch.extras["logits"][8:])
    torch.testing.assert_close(strategy.penalties(batch, output)["der"], by_hand)
    torch.testing.assert_close(strategy.task_loss(batch, output), F.cross_entropy(output.logits[:8], batch.labels[:8]))


def test_outputs_that_had_not_been_revealed_are_not_held():
    strategy = DER(memory=Reservoir(size=30), replay_batch_size=5)
    task, model = in_second_task(strategy, "class")
    batch = strategy.before_batch(task.train[:8])
    output = model(batch.images)
    loss = strategy.penalties(batch, output)["der"]
    by_hand = 0.5 * F.mse_loss(output.logits[8:, :4], batch.extras["logits"][8:, :4])
    torch.testing.assert_close(loss, by_hand)
    model.zero_grad()
    loss.backward()
    assert model.head.weight.grad[:4].abs().sum() > 0
    assert (model.head.weight.grad[4:] == 0).all()
    assert model.head.weight.grad.isfinite().all()


def test_outputs_that_are_revealed_later_are_held_to_what_they_answer_then():
    strategy = DER(memory=Reservoir(size=30))
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    learn(strategy, stream, model, tasks=1)
    before = strategy.memory.examples.extras["logits"].clone()
    model.reveal(stream.tasks[1])
    model.train()
    statistics = model.backbone[2].running_mean.clone()
    strategy.before_task(stream.tasks[1])
    held = strategy.memory.examples
    assert model.training
    assert torch.equal(statistics, model.backbone[2].running_mean)
    assert torch.equal(held.extras["logits"][:, :2], before[:, :2])
    torch.testing.assert_close(held.extras["logits"][:, 2:4], model.eval()(held.images).logits[:, 2:4].detach())
    assert (held.extras["logits"][:, 4:] == -torch.inf).all()


def test_outputs_that_were_active_from_the_start_are_all_held():
    strategy = DER(memory=Reservoir(size=30))
    in_second_task(strategy, "class", active_logits="all")
    assert strategy.memory.examples.extras["logits"].isfinite().all()


def test_derpp_learns_logits_and_labels_of_two_independent_draws():
    strategy = DERpp(memory=Reservoir(size=60), alpha=0.3, beta=0.7, replay_batch_size=6)
    task, model = in_second_task(strategy, "domain")
    batch = strategy.before_batch(task.train[:8])
    assert len(batch) == 8 + 6 + 6
    assert not torch.equal(batch.images[8:14], batch.images[14:])
    output = model(batch.images)
    losses = F.cross_entropy(output.logits, batch.labels, reduction="none")
    torch.testing.assert_close(strategy.task_loss(batch, output), losses[:8].mean() + 0.7 * losses[14:].mean())
    by_hand = 0.3 * F.mse_loss(output.logits[8:14], batch.extras["logits"][8:14])
    torch.testing.assert_close(strategy.penalties(batch, output)["der"], by_hand)


def test_a_term_of_weight_zero_draws_nothing():
    for alpha, beta, rows in ((0.0, 0.5, 6), (0.5, 0.0, 6), (0.5, 0.5, 12)):
        strategy = DERpp(memory=Reservoir(size=60), alpha=alpha, beta=beta, replay_batch_size=6)
        task, _ = in_second_task(strategy)
        assert len(strategy.before_batch(task.train[:8])) == 8 + rows
