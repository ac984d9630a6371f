import torch

from cl_runner.components import build
from cl_runner.compose import compose_jobs
from cl_runner.config import validated
from tests.toys import learn, toy_model, toy_stream


def preset(*overrides):
    (cfg,) = compose_jobs(["strategy=online_ewc", "model=mlp", "fisher=exact", "tracker=local", *overrides])
    return build(validated(cfg)["strategy"])


def held(strategy):
    (term,) = strategy.previous.terms
    return term.curvature.values


def test_without_decay_it_holds_the_sum_of_all_fishers_around_the_last_weights():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = preset("strategy.decay=1.0", "strategy.strength=0")
    fishers = []

    class Kept(type(strategy)):
        def after_task(self, task):
            super().after_task(task)
            fishers.append(self.fisher(self.model, task.train).values)

    strategy.__class__ = Kept
    learn(strategy, stream, model, tasks=2)
    (term,) = strategy.previous.terms
    for name, values in term.curvature.values.items():
        torch.testing.assert_close(values, fishers[0][name] + fishers[1][name])
        assert torch.equal(term.anchor[name], model.state_dict()[name])


def test_the_preset_decays_the_sum_before_each_task_is_added():
    found = {}
    for decay in (1.0, preset().decay, 0.0):
        stream = toy_stream("domain")
        strategy = preset("strategy.strength=0", f"strategy.decay={decay}")
        learn(strategy, stream, toy_model(stream), tasks=2)
        found[decay] = held(strategy)
    decay = preset().decay
    assert 0 < decay < 1
    for name, values in found[decay].items():
        first = found[1.0][name] - found[0.0][name]
        torch.testing.assert_close(values, decay * first + found[0.0][name], rtol=1e-4, atol=1e-7)
