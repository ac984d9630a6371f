import torch

from cl_runner.strategies import CODAPrompt
from tests.toys import learn, toy_stream
from tests.vits import toy_vit_model


def method(**settings):
    return CODAPrompt(blocks=[0, 2], components=4, length=4, **settings)


def test_components_of_earlier_tasks_stay():
    stream = toy_stream()
    learn(first := method(), stream, toy_vit_model(stream), tasks=1)
    learn(last := method(), stream, toy_vit_model(stream))
    for (_, early), (current, late) in zip(first.prompts.banks, last.prompts.banks, strict=True):
        assert torch.equal(early[:, :4], late[:, :4])
        assert early[:, :4].flatten(2).any(2).all()
        assert not early[:, 4:].any()
        assert late.flatten(2).any(2).all()
        assert not current.any()  # counted among the earlier ones


def test_its_loss_is_zero_for_orthonormal_components_and_grows_as_they_depend_on_each_other():
    stream = toy_stream()
    model = toy_vit_model(stream)
    strategy = method(strength=0.5)
    strategy.setup(model, stream)
    strategy.before_task(stream.tasks[0])
    batch = stream.tasks[0].train
    output = model(batch.images)
    terms = strategy.penalties(batch, output)
    assert list(terms) == ["orthogonality"]
    assert terms["orthogonality"] < 1e-6
    with torch.no_grad():
        keys = strategy.prompts.get_parameter("keys")
        keys[0, 1] = keys[0, 0]
    torch.testing.assert_close(strategy.penalties(batch, output)["orthogonality"], torch.tensor(0.5 * 2.0))
    strategy.strength = 0.0
    assert strategy.penalties(batch, output) == {}


def test_the_loss_holds_the_components_together():
    stream = toy_stream()
    drift = {}
    for strength in (0.0, 1.0):
        strategy = method(strength=strength)
        strategy.after_task = lambda task: None  # looked at before they are stored
        learn(strategy, stream, toy_vit_model(stream), tasks=1, epochs=5)
        drift[strength] = strategy.prompts.dependence().item()
    assert drift[1.0] < drift[0.0]
