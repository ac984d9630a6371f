import torch
import torch.nn.functional as F

from cl_runner.strategies import DualPrompt
from tests.toys import learn, toy_stream
from tests.vits import toy_vit_model


def method(**settings):
    return DualPrompt(general_blocks=[0], expert_blocks=[1, 2], general_length=2, expert_length=4, **settings)


def test_experts_and_keys_of_earlier_tasks_stay_and_general_prompts_go_on_learning():
    stream = toy_stream()
    strategy = method()
    learn(strategy, stream, toy_vit_model(stream), tasks=1)
    first = {name: value.clone() for name, value in strategy.prompts.state_dict().items()}
    assert first["learned"].tolist() == [True, False, False]
    learn(strategy := method(), stream, toy_vit_model(stream))
    last = strategy.prompts.state_dict()
    for name in ("past_experts", "past_keys"):
        assert first[name][0].any()
        assert torch.equal(first[name][0], last[name][0])
        assert not torch.equal(last[name][0], last[name][1])
    assert not torch.equal(first["general"], last["general"])


def test_a_tasks_experts_start_where_the_last_tasks_ended_and_its_key_anew():
    stream = toy_stream()
    strategy = method()
    learn(strategy, stream, toy_vit_model(stream), tasks=1)
    strategy.before_task(stream.tasks[1])
    assert torch.equal(strategy.prompts.expert, strategy.prompts.past_experts[0])
    assert not torch.equal(strategy.prompts.key, strategy.prompts.past_keys[0])


def test_its_loss_is_the_distance_of_the_tasks_key_to_the_query():
    stream = toy_stream()
    model = toy_vit_model(stream)
    batch = stream.tasks[0].train
    query = model.eval()(batch.images).features.detach()
    strategy = method(strength=0.5)
    strategy.setup(model, stream)
    strategy.before_task(stream.tasks[0])
    model.train()
    terms = strategy.penalties(batch, model(batch.images))
    assert list(terms) == ["matching"]
    expected = 0.5 * (1 - F.cosine_similarity(query, strategy.prompts.key[None])).mean()
    torch.testing.assert_close(terms["matching"], expected)


def test_an_image_gets_the_prompts_of_the_task_whose_key_it_is_near_whatever_task_is_told():
    stream = toy_stream("class")
    model = toy_vit_model(stream)
    test = stream.tasks[1].test
    query = model.eval()(test.images).features.detach().mean(0)
    strategy = method()
    learn(strategy, stream, model, epochs=1)
    prompts, told = strategy.prompts.eval(), torch.zeros_like(test.task_ids)
    with torch.no_grad():
        prompts.past_keys.copy_(torch.stack([-query, query, -query]))
        scores = strategy.predict(test.images, told)
        prompts.past_experts[[0, 2]] = 1.0
        assert torch.equal(strategy.predict(test.images, told), scores)
        prompts.past_experts[1] = 1.0
        assert not torch.allclose(strategy.predict(test.images, told), scores)
