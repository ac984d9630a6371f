import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.model import Output, PretrainedView, trainable
from cl_runner.strategies import EWC, Finetune
from cl_runner.strategies.anchors import Anchor
from cl_runner.streams.split import Split
from tests.toys import assert_same_with_gradients, learn, toy_model, toy_stream, toy_training

DIGITS = Split(name="digits", num_tasks=5)


def exact(**settings):
    return Exact(**{"num_samples": None, "batch_size": 16, **settings})


def penalty(strategy):
    batch = strategy.stream.tasks[0].train[:4]
    return strategy.penalties(batch, strategy.model(batch.images))


def held_term(strategy):
    (term,) = strategy.previous.terms
    return term


def moved(model, amount=0.1):
    """Every weight a step away from where it was, no gradient left of before."""
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount


def test_the_penalty_is_zero_where_it_is_anchored_and_has_no_gradient_there():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, model, tasks=1)
    model.zero_grad()
    loss = penalty(strategy)["ewc"]
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_the_penalty_is_factor_times_strength_times_fisher_times_squared_distance():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=30.0, factor=0.5)
    learn(strategy, stream, model, tasks=1)
    fisher = exact()(model, stream.tasks[0].train)
    moved(model, 0.1)
    expected = 0.5 * 30.0 * sum((values * 0.1**2).sum() for values in fisher.values.values())
    torch.testing.assert_close(penalty(strategy)["ewc"], expected)


class TermATask(EWC):
    """Every task's Fisher and weights, kept apart and summed by autograd: the definition."""

    def setup(self, model, stream):
        super().setup(model, stream)
        self.kept = []

    def after_task(self, task):
        super().after_task(task)
        anchor = Anchor.at(self.model)
        self.kept.append((self.fisher(self.model, task.train).only(anchor.weights), anchor))

    def penalties(self, batch, output):
        return {"ewc": self.slow()} if self.kept else {}

    def slow(self):
        live = trainable(self.model)
        return 0.5 * self.strength * torch.stack([F.quadratic(at.distance(live)) for F, at in self.kept]).sum()


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
@pytest.mark.parametrize("logits", ["visible", "all"])
def test_a_term_a_task_adds_up_over_tasks_and_is_held_as_one(scenario, logits):
    stream = toy_stream(scenario, num_tasks=4)
    model = toy_model(stream)
    strategy = TermATask(fisher=exact(logits=logits), strength=20.0)
    learn(strategy, stream, model, tasks=3)
    assert len(strategy.kept) == 3
    assert len(strategy.previous.terms) == 1
    moved(model, 0.01)
    held, expected = EWC.penalties(strategy, stream.tasks[0].train[:4], None)["ewc"], strategy.slow()
    torch.testing.assert_close(held, expected)
    parameters = list(model.parameters())
    slopes = (torch.autograd.grad(value, parameters) for value in (held, expected))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scenario", ["task", "class", "domain"])
@pytest.mark.parametrize("representation", ["kfac", "ekfac", "full"])
def test_a_fisher_with_correlations_adds_up_over_tasks_as_a_diagonal_does(representation, scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = TermATask(fisher=exact(representation=representation), strength=20.0)
    learn(strategy, stream, model, tasks=2)
    moved(model, 0.01)
    held = EWC.penalties(strategy, stream.tasks[0].train[:4], None)["ewc"]
    assert_same_with_gradients(held, strategy.slow(), model)


@pytest.mark.parametrize(("accumulation", "old", "new"), [("sum", 0.6, 1.0), ("average", 0.5, 0.5)])
@pytest.mark.parametrize("representation", ["diagonal", "kfac", "ekfac", "full"])
def test_a_single_term_of_all_fishers_is_around_the_last_weights(representation, accumulation, old, new):
    stream = toy_stream("task")
    model = toy_model(stream)
    fisher = exact(representation=representation)
    decay = old if accumulation == "sum" else 1.0
    strategy = EWC(fisher=fisher, strength=20.0, accumulation=accumulation, decay=decay)
    learn(strategy, stream, model, tasks=1)
    first = fisher(model, stream.tasks[0].train)
    learn_second(strategy, stream, model)
    second, anchor = fisher(model, stream.tasks[1].train), Anchor.at(model)
    strategy.after_task(stream.tasks[1])
    moved(model, 0.01)
    away = anchor.distance(trainable(model))
    by_hand = 10.0 * sum(
        weight * each.only(anchor.weights).quadratic(away) for weight, each in ((old, first), (new, second))
    )
    assert_same_with_gradients(penalty(strategy)["ewc"], by_hand, model)


def test_training_is_what_it_is_with_a_term_a_task():
    losses = []
    for method in (EWC, TermATask):
        stream = toy_stream(num_tasks=4)
        rows = learn(method(fisher=exact(), strength=30.0), stream, toy_model(stream))
        losses.append([row["loss"] for row in rows])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_get_the_penalty_once_together(precision):
    weights = []
    for accumulate in (1, 4):
        stream = toy_stream()
        model = toy_model(stream)
        learn(EWC(fisher=exact(), strength=30.0), stream, model, accumulate=accumulate, precision=precision)
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)


def test_a_decay_of_what_is_no_running_sum_is_refused():
    with pytest.raises(
        ConfigError, match=r"strategy\.decay: expected 1\.0 unless strategy\.accumulation=sum, got 0\.9"
    ):
        EWC(fisher=exact(), decay=0.9, accumulation="average").check(DIGITS, EfficientNetLite0(pretrained=False))


def test_what_is_held_is_not_what_learns():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, model, tasks=1)
    held = {name: value.clone() for name, value in held_term(strategy).anchor.items()}
    moved(model)
    assert all(torch.equal(value, held[name]) for name, value in held_term(strategy).anchor.items())


def test_a_parameter_frozen_after_it_was_anchored_counts_and_is_no_error():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, model, tasks=1)
    moved(model)
    before = penalty(strategy)["ewc"].detach()
    model.backbone[1].weight.requires_grad_(False)
    loss = penalty(strategy)["ewc"]
    loss.backward()
    assert torch.equal(loss, before)
    assert model.backbone[1].weight.grad is None
    assert model.backbone[1].bias.grad.any()


def test_a_compiled_backbone_is_held_as_any():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone.compile(backend="eager")
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, model, tasks=1)
    moved(model)
    loss = penalty(strategy)["ewc"]
    loss.backward()
    term = held_term(strategy)
    for name, parameter in model.named_parameters():
        expected = term.curvature.values[name] * (parameter - term.anchor[name])  # half of two
        torch.testing.assert_close(parameter.grad, expected.detach())


def test_the_running_sum_decays_and_is_anchored_to_the_last_weights():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=1.0, accumulation="sum", decay=0.5)
    learn(strategy, stream, model, tasks=1)
    first = held_term(strategy)
    moved(model, 0.05)
    strategy.after_task(stream.tasks[0])
    second = exact()(model, stream.tasks[0].train)
    term = held_term(strategy)
    assert term.constant == 0
    for name, values in term.curvature.values.items():
        torch.testing.assert_close(values, 0.5 * first.curvature.values[name] + second.values[name])
        torch.testing.assert_close(term.anchor[name], first.anchor[name] + 0.05)


def test_a_strong_penalty_holds_the_weights_that_matter():
    distances = {}
    for strength in (0.0, 30.0):
        stream = toy_stream("domain")
        model = toy_model(stream)
        strategy = EWC(fisher=exact(), strength=strength)
        learn(strategy, stream, model, tasks=1)
        held = strategy.previous
        learn_second(strategy, stream, model)
        distances[strength] = held(trainable(model)).item()
    assert distances[30.0] < 0.5 * distances[0.0]


def learn_second(strategy, stream, model):
    held = strategy.previous
    training, _ = toy_training(strategy, stream, model)
    strategy.previous = held
    model.reveal(stream.tasks[1])
    training.learn(stream.tasks[1], stream.tasks[1].train)


def test_a_partly_frozen_backbone_is_no_error():
    stream = toy_stream()
    model = toy_model(stream)
    model.backbone[1].weight.requires_grad_(False)
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, model)
    assert "backbone.1.weight" not in held_term(strategy).anchor
    assert "backbone.1.bias" in held_term(strategy).anchor


def test_a_wholly_frozen_backbone_is_no_error_either():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    model.backbone.requires_grad_(False)
    learn(EWC(fisher=exact(), strength=1.0), stream, model)


@pytest.mark.parametrize("logits", ["visible", "seen", "all"])
@pytest.mark.parametrize("scenario", ["task", "class"])
def test_no_anchor_covers_a_head_row_that_is_not_revealed(scenario, logits):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = EWC(fisher=exact(logits=logits), strength=1.0)
    learn(strategy, stream, model, tasks=1)
    assert held_term(strategy).curvature.values["head.weight"][:2].any()
    model.reveal(stream.tasks[1])  # draws the second task's rows afresh
    assert penalty(strategy)["ewc"] == 0
    with torch.no_grad():
        model.head.weight[0] += 1
    assert penalty(strategy)["ewc"] > 0


def test_no_fisher_is_estimated_after_the_last_task():
    stream = toy_stream()
    estimated = []

    class Counting(Exact):
        def estimate(self, model, examples):
            estimated.append(len(examples))
            return super().estimate(model, examples)

    learn(EWC(fisher=Counting(num_samples=None, batch_size=16), strength=1.0), stream, toy_model(stream))
    assert len(estimated) == 2


def test_what_the_fishers_took_is_reported_in_sum_and_of_the_last_what_it_is():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=Probe(num_samples=20), strength=1.0)
    learn(strategy, stream, model, tasks=2)
    report = strategy.report()
    assert (report["fisher_samples"], report["fisher_backward_passes"]) == (40, 40)
    last, of_last = Probe(num_samples=20).estimate(model, stream.tasks[1].train)
    assert report["fisher_trace"] == pytest.approx(float(last.trace()))
    assert report["fisher_relative_error"] == pytest.approx(of_last.relative_error)
    assert report["fisher_seconds"] > 0


def test_the_head_can_be_left_out():
    stream = toy_stream()
    strategy = EWC(fisher=exact(), strength=1.0, head=False)
    learn(strategy, stream, toy_model(stream), tasks=1)
    term = held_term(strategy)
    assert {name.split(".")[0] for name in [*term.anchor, *term.curvature.values]} == {"backbone"}


def test_the_pretrained_weights_are_task_zero_with_the_fisher_of_their_own_head():
    stream = toy_stream()
    model = toy_model(stream, pretrained=True)
    before = Anchor.at(model, head=False).weights
    expected = exact()(PretrainedView(model), stream.tasks[0].train)
    strategy = EWC(fisher=exact(), strength=2.0)
    learn(strategy, stream, model, tasks=1)
    (term,) = strategy.pretrained.terms
    fisher = term.curvature.values
    assert term.anchor.keys() == fisher.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(term.anchor[name], value)
        torch.testing.assert_close(fisher[name], expected.values[name])


def test_the_pretrained_anchor_acts_in_the_first_task_already():
    stream = toy_stream()
    rows = learn(
        EWC(fisher=Probe(), strength=1.0, anchor="pretrained"), stream, toy_model(stream, pretrained=True), tasks=1
    )
    assert rows[-1]["loss"]["ewc_pretrained"] > 0
    assert "ewc" not in rows[-1]["loss"]


def test_the_pretrained_strength_can_be_set_apart():
    stream = toy_stream()
    strategy = EWC(fisher=Probe(), strength=1.0, pretrained_strength=3.0)
    learn(strategy, stream, toy_model(stream, pretrained=True), tasks=1)
    moved(strategy.model)
    strategy.previous = strategy.pretrained
    terms = penalty(strategy)
    torch.testing.assert_close(terms["ewc_pretrained"], 3 * terms["ewc"])


@pytest.mark.parametrize("anchor", ["pretrained", "both"])
def test_an_explicit_pretrained_anchor_needs_a_pretrained_head(anchor):
    strategy = EWC(fisher=exact(), anchor=anchor)
    strategy.check(DIGITS, EfficientNetLite0(pretrained=True))
    with pytest.raises(ConfigError, match=r"strategy\.anchor: expected auto or previous"):
        strategy.check(DIGITS, EfficientNetLite0(pretrained=False))


def test_strength_zero_is_fine_tuning():
    weights = []
    for strategy in (EWC(fisher=exact(), strength=0.0), Finetune()):
        stream = toy_stream()
        model = toy_model(stream)
        learn(strategy, stream, model)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])


def test_the_fisher_pass_leaves_modes_and_statistics_alone():
    stream = toy_stream()
    model = toy_model(stream, norm=True)
    strategy = EWC(fisher=exact(), strength=1.0)
    training, _ = toy_training(strategy, stream, model)
    model.reveal(stream.tasks[0])
    training.learn(stream.tasks[0], stream.tasks[0].train)
    before = {name: value.clone() for name, value in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    strategy.after_task(stream.tasks[0])
    assert any(modes.values())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_output_is_not_needed_for_the_penalty():
    stream = toy_stream()
    strategy = EWC(fisher=exact(), strength=1.0)
    learn(strategy, stream, toy_model(stream), tasks=1)
    nothing = torch.empty(0)
    assert strategy.penalties(stream.tasks[0].train[:0], Output(nothing, nothing, nothing))["ewc"] == 0


def test_an_average_counts_each_class_once_and_is_around_the_last_weights():
    stream = toy_stream()
    model = toy_model(stream)
    strategy = EWC(fisher=exact(), strength=0.0, accumulation="average")
    fishers = []

    class Kept(EWC):
        def after_task(self, task):
            super().after_task(task)
            fishers.append(exact()(self.model, task.train).values)

    strategy.__class__ = Kept
    learn(strategy, stream, model, tasks=2)
    term = held_term(strategy)
    for name, values in term.curvature.values.items():
        torch.testing.assert_close(values, (fishers[0][name] + fishers[1][name]) / 2)
        assert torch.equal(term.anchor[name], model.state_dict()[name])
