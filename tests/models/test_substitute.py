import torch
from torch import nn

from cl_runner.models.substitute import call_with, nothing_kept, places


def registered_twice() -> nn.Module:
    shared = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = shared.weight
    return nn.Sequential(shared, nn.BatchNorm1d(3), shared, tied)


def test_a_module_registered_twice_is_one_place_and_a_weight_of_two_modules_is_two():
    assert list(places(registered_twice()))[:2] == ["0.weight", "0.bias"]
    assert "2.weight" not in places(registered_twice())
    assert {"3.weight", "3.bias", "1.running_mean"} <= places(registered_twice()).keys()


def test_a_call_with_other_values_is_that_of_a_model_that_has_them_and_leaves_the_model_as_it_was():
    model, other = registered_twice().eval(), registered_twice().eval()
    inputs = torch.randn(5, 3)
    for values in (other.state_dict(), dict(other.named_parameters())):
        before = dict(model.named_parameters(remove_duplicate=False))
        assert torch.equal(call_with(model, values, inputs), other(inputs))
        after = dict(model.named_parameters(remove_duplicate=False))
        assert before.keys() == after.keys()
        assert all(after[name] is parameter for name, parameter in before.items())


def test_what_a_module_keeps_of_its_weights_is_dropped_before_and_after():
    module = nn.Linear(3, 3)
    module.attention_bias_cache = {"old": torch.ones(1)}
    with nothing_kept(nn.Sequential(module)):
        assert not module.attention_bias_cache
        module.attention_bias_cache["new"] = torch.ones(1)
    assert not module.attention_bias_cache
