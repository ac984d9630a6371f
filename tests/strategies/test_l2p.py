import torch
import torch.nn.functional as F

from cl_runner.strategies import L2P
from tests.toys import learn, toy_stream, toy_training
from tests.vits import toy_vit_model


def test_its_loss_is_the_distance_of_the_chosen_keys_to_the_query():
    stream = toy_stream()
    model = toy_vit_model(stream)
    batch = stream.tasks[0].train
    query = model.eval()(batch.images).features.detach()
    strategy = L2P(pool=6, length=2, top=3, strength=0.25)
    strategy.setup(model, stream)
    strategy.before_task(stream.tasks[0])
    (name, loss), *others = strategy.penalties(batch, model(batch.images)).items()
    distances = 1 - F.normalize(query) @ F.normalize(strategy.prompts.keys).T
    torch.testing.assert_close(loss, 0.25 * distances.topk(3, largest=False).values.sum(1).mean())
    assert (name, others) == ("matching", [])


def test_only_prompts_that_are_chosen_learn():
    stream = toy_stream()
    model = toy_vit_model(stream)
    strategy = L2P(pool=8, length=2, top=2)
    training, _ = toy_training(strategy, stream, model, epochs=1, batch_size=24)
    query = model.eval()(stream.tasks[0].train.images).features.detach()
    before = strategy.prompts.prompts.clone()
    chosen = set((F.normalize(query) @ F.normalize(strategy.prompts.keys).T).topk(2).indices.flatten().tolist())
    model.reveal(stream.tasks[0])
    strategy.before_task(stream.tasks[0])
    training.learn(stream.tasks[0], stream.tasks[0].train)
    changed = {index for index in range(8) if not torch.equal(strategy.prompts.prompts[index], before[index])}
    assert changed == chosen
    assert 0 < len(chosen) < 8


def test_keys_come_nearer_to_what_they_are_chosen_for():
    stream = toy_stream()
    rows = learn(L2P(pool=6, length=2, top=3, strength=1.0), stream, toy_vit_model(stream), tasks=1, epochs=10)
    assert rows[-1]["loss"]["matching"] < 0.8 * rows[0]["loss"]["matching"]
