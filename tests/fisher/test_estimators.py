"""The fast estimators against their definitions as loops."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.fisher import reference
from cl_runner.fisher.batched import Batched
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.engine import undisturbed
from cl_runner.fisher.estimators import (
    Argmax,
    Empirical,
    Estimator,
    Exact,
    Logits,
    Probe,
    Reversed,
    Sampled,
)
from cl_runner.fisher.full import Full
from cl_runner.fisher.hybrid import Draws, Hybrid, plan_of
from cl_runner.fisher.kronecker import Kronecker
from cl_runner.fisher.representations import Representation
from cl_runner.gradients import fallbacks
from cl_runner.gradients.kernels import Precision
from cl_runner.models.model import Classifier, Model, Network, PretrainedView
from cl_runner.randomness import task_seed
from cl_runner.streams.base import Examples, Scenario

from .cases import BACKBONES, CHANNELS, FEATURES, OUTPUTS, SIDE, UNCOVERED, distance, examples, model

ESTIMATORS: dict[str, Estimator] = {
    "exact": Exact(),
    "sampled": Sampled(draws=3),
    "probe": Probe(draws=3),
    "hybrid": Hybrid(budget=1.2),
    "empirical": Empirical(),
    "argmax": Argmax(),
    "reversed": Reversed(),
    "batched": Batched(),
}
PER_SAMPLE = [name for name in ESTIMATORS if name != "batched"]


def by_definition(estimator: Estimator, model: Classifier, examples: Examples) -> Diagonal:
    """What `reference` computes for `estimator`."""
    generator = torch.Generator().manual_seed(estimator.seed_for(examples))
    if isinstance(estimator, Hybrid):
        with undisturbed(model):
            prepared = estimator.prepared(model, examples)
        draws, threshold = Draws.of(plan_of(prepared), generator), float(prepared.extras["threshold"][0])
        return reference.hybrid(model, examples, threshold, draws.dice, draws.signs, estimator.logits)
    noise = estimator.noise(len(examples), len(model.revealed), generator)
    definition: Callable[..., Diagonal] = getattr(reference, type(estimator).__name__.lower())
    drawn = {"sampled": {"clocks": noise}, "probe": {"signs": noise}, "batched": {"batch_size": estimator.batch_size}}
    return definition(model, examples, logits=estimator.logits, **drawn.get(definition.__name__, {}))


@pytest.mark.parametrize("backbone", [*BACKBONES, *UNCOVERED])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_its_definition(name: str, backbone: str) -> None:
    estimator, subject = replace(ESTIMATORS[name], batch_size=4), model(backbone)
    # Eleven samples: the last batch of four is short.
    assert distance(estimator(subject, examples(11)), by_definition(estimator, subject, examples(11))) < 1e-10


@pytest.mark.parametrize("scenario", Scenario)
@pytest.mark.parametrize("logits", ["visible", "seen", "all"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_its_definition_whatever_outputs_enter(name: str, logits: Logits, scenario: Scenario) -> None:
    estimator, subject = replace(ESTIMATORS[name], logits=logits), model(scenario=scenario)
    assert distance(estimator(subject, examples()), by_definition(estimator, subject, examples())) < 1e-10


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_its_definition_when_few_gradients_fit_into_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, subject = replace(ESTIMATORS[name], logits="all"), model()
    expected = by_definition(estimator, subject, examples())
    monkeypatch.setattr(fallbacks, "BUDGET", 2 * sum(values.numel() for values in subject.parameters()))
    assert distance(estimator(subject, examples()), expected) < 1e-10


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_is_its_definition_for_a_pretrained_model_under_its_own_head(name: str) -> None:
    torch.manual_seed(1)
    view = PretrainedView(model(pretrained_head=nn.Linear(FEATURES, 9)))
    estimator = ESTIMATORS[name].for_pretrained()
    found = estimator(view, examples())
    assert all(name.startswith("backbone.") for name in found.values)
    assert distance(found, by_definition(estimator, view, examples())) < 1e-10


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_batch_size_changes_nothing(name: str, precision: torch.dtype) -> None:
    estimator, subject, data = ESTIMATORS[name], model("batch norm").to(precision), examples(70)
    alone = replace(estimator, batch_size=1)(subject, data)
    for batch_size in (7, 64):
        assert distance(replace(estimator, batch_size=batch_size)(subject, data), alone) < 1e-5


def test_exact_takes_one_pass_less_than_there_are_outputs_whatever_the_tasks_in_a_batch() -> None:
    subject = model()
    subject.visible[1] = False
    subject.visible[1, 2] = True  # a task of one class: nothing to tell apart, no curvature
    data = examples()
    own = Exact()(subject, data[data.task_ids == 0])
    mixed = Exact()(subject, data)
    assert distance(mixed.scaled(len(data) / int((data.task_ids == 0).sum())), own) < 1e-10
    assert Exact()(subject, data[data.task_ids == 1]).trace() == 0
    assert [Exact().passes(outputs) for outputs in (1, 2, 10)] == [0, 1, 9]


@pytest.mark.parametrize("name", ["sampled", "probe"])
def test_a_drawing_estimator_takes_a_pass_a_draw(name: str) -> None:
    assert ESTIMATORS[name].passes(100) == 3


@pytest.mark.parametrize(("lead", "tolerance"), [(30, 1e-4), (300, 0)], ids=["almost", "beyond float32"])
def test_exact_keeps_what_curvature_float32_can_hold_of_a_model_that_is_sure(lead: float, tolerance: float) -> None:
    subject = model("linear")
    with torch.no_grad():
        subject.head.bias[[0, 3]] += lead
    expected = reference.exact(subject, examples())
    found = Exact()(subject.float(), examples())
    assert 0 < expected.trace() < 1e-6
    assert distance(found, expected) <= tolerance if tolerance else found.trace() == 0


@pytest.mark.parametrize("estimator", [Sampled(draws=4000), Probe(draws=4000)], ids=["sampled", "probe"])
def test_it_is_exact_on_average(estimator: Estimator) -> None:
    subject, data = model("linear"), examples(3)
    expected = Exact()(subject, data).trace()
    few = [float(replace(estimator, draws=100, seed=1 + seed)(subject, data).trace()) for seed in range(12)]
    error = torch.tensor(few).std() * (100 / 4000) ** 0.5
    assert float((estimator(subject, data).trace() - expected).abs()) < 4 * float(error)
    assert float(error) < 0.05 * float(expected)


def test_empirical_is_exact_on_average_when_labels_come_from_the_model() -> None:
    subject = model(scenario=Scenario.CLASS).eval()
    one = examples(1)
    many = Examples(one.images.expand(4000, -1, -1, -1), one.labels.repeat(4000), one.task_ids.repeat(4000))
    p = subject.restrict(subject(one.images).logits, one.task_ids).softmax(1)
    labels = p[0].multinomial(4000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = Empirical(batch_size=500)(subject, replace(many, labels=labels))
    assert distance(found, Exact()(subject, one)) < 0.1


def test_of_a_model_that_is_sure_a_probe_says_more_than_a_sampled_label() -> None:
    subject, data = model(scenario=Scenario.CLASS), examples(100)
    with torch.no_grad():
        subject.head.bias[0] += 10
    exact = Exact()(subject, data)

    def error(estimator: Estimator) -> float:
        return sum(distance(replace(estimator, seed=seed)(subject, data), exact) for seed in range(5)) / 5

    assert error(Probe()) < 0.5 * error(Sampled())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_modes_buffers_and_gradients_are_as_they_were(name: str) -> None:
    subject = model("batch norm")
    subject.backbone[1].eval()
    subject.backbone[0].weight.grad = torch.ones_like(subject.backbone[0].weight)
    with untouched(subject):
        ESTIMATORS[name](subject, examples())


class Failing(nn.Module):
    """Writes to its buffers even in eval mode, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(CHANNELS * SIDE * SIDE, FEATURES), nn.Dropout()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        raise RuntimeError("as told")


def test_modes_and_buffers_are_as_they_were_after_an_exception() -> None:
    subject = model(Failing())
    with untouched(subject), pytest.raises(RuntimeError, match="as told"):
        Exact()(subject, examples())


class untouched:  # noqa: N801
    """Assert that everything a model holds has the same identity and value after the block as before it."""

    def __init__(self, subject: Model) -> None:
        self.subject = subject

    def __enter__(self) -> None:
        self.before, self.held = self.look(), copy.deepcopy(self.look())

    def __exit__(self, *_: object) -> None:
        after = self.look()
        assert after.keys() == self.held.keys()
        for key, value in self.held.items():
            if isinstance(value, Tensor):
                assert after[key] is self.before[key], key
                assert torch.equal(after[key], value), key
            else:
                assert after[key] == value, key

    def look(self) -> dict[str, object]:
        modes = {f"{name} mode": module.training for name, module in self.subject.named_modules()}
        live = dict(self.subject.named_parameters())
        asked = {f"{name} asks": values.requires_grad for name, values in live.items()}
        gradients = {f"{name} grad": values.grad for name, values in live.items()}
        return modes | asked | gradients | dict(self.subject.named_buffers()) | live


def test_it_sees_images_without_augmentation() -> None:
    subject = model()
    drawn = [subject.preprocess(examples().images) for _ in range(2)]
    assert not torch.equal(*drawn), "the model augments"
    first, second = (Exact()(subject, examples()) for _ in range(2))
    assert distance(first, second) == 0


def test_it_draws_nothing_from_the_global_generator() -> None:
    subject, before = model(), torch.get_rng_state()
    Sampled(num_samples=5)(subject, examples())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["exact", "sampled", "probe", "hybrid"])
def test_its_seed_chooses_the_samples_and_the_draws(name: str) -> None:
    estimator, subject = replace(ESTIMATORS[name], num_samples=6), model()
    first, same, other = (replace(estimator, seed=seed)(subject, examples()) for seed in (0, 0, 1))
    assert distance(first, same) == 0
    assert distance(first, other) > 1e-3


@pytest.mark.parametrize("estimator", [Sampled(), Probe(), Exact(num_samples=6)], ids=["labels", "signs", "samples"])
def test_errors_of_several_tasks_do_not_add_up(estimator: Estimator) -> None:
    subject, data = model(scenario=Scenario.DOMAIN), examples()
    tasks = [replace(data, task_ids=torch.full_like(data.task_ids, task)) for task in range(20)]
    expected = Exact(logits="all")(subject, data)
    mean, *others = (replace(estimator, logits="all")(subject, task) for task in tasks)
    error = distance(mean, expected)
    for other in others:
        mean = mean.plus(other)
    assert distance(mean.scaled(1 / 20), expected) < error / 2


def test_samples_are_drawn_without_replacement() -> None:
    subject, data = model(), examples()
    everything = Exact()(subject, data)
    assert distance(Exact(num_samples=11)(subject, data), everything) < 1e-12
    assert distance(Exact(num_samples=100)(subject, data), everything) < 1e-12
    # The ten drawn and the one left out make up the whole.
    tens = Exact(num_samples=10)(subject, data)
    left_out = [everything.scaled(11).plus(Exact()(subject, data[i : i + 1]), -1).scaled(0.1) for i in range(11)]
    assert min(distance(tens, candidate) for candidate in left_out) < 1e-10


def test_its_samples_are_not_those_that_training_began_with() -> None:
    subject, data = model(), examples()
    first_epoch = torch.randperm(len(data), generator=torch.Generator().manual_seed(task_seed(0, 0)))
    began_with = Exact()(subject, data[first_epoch[:6]])
    assert distance(Exact(num_samples=6, seed=0)(subject, data), began_with) > 1e-3


def test_an_estimator_is_the_same_after_a_call() -> None:
    estimator = Probe(num_samples=5)
    before = copy.deepcopy(vars(estimator))
    estimator(model(), examples())
    estimator.estimate(model(), examples())
    assert vars(estimator) == before


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_what_a_call_gives(name: str) -> None:
    estimator, subject = ESTIMATORS[name], model()
    found, report = estimator.estimate(subject, examples())
    assert distance(found, estimator(subject, examples())) == 0
    assert report.trace == float(found.trace())
    assert (report.relative_error is None) == (name not in ("sampled", "probe", "hybrid"))


@pytest.mark.parametrize(("estimator", "passes"), [(Exact(), 7 + 2 * 4), (Probe(draws=3), 33), (Batched(), 11)])
def test_it_reports_a_backward_pass_for_every_sample_and_vector(estimator: Estimator, passes: int) -> None:
    data = replace(examples(), task_ids=(torch.arange(11) > 6).long())
    data = replace(data, labels=3 * data.task_ids)
    start = time.perf_counter()
    # One sample at a time: in a batch of mixed tasks, those with fewer outputs get zero vectors.
    size = {} if isinstance(estimator, Batched) else {"batch_size": 1}
    report = replace(estimator, **size).estimate(model(), data)[1]
    assert (report.samples, report.backward_passes) == (11, passes)
    assert 0 < report.seconds < time.perf_counter() - start
    assert replace(estimator, num_samples=5).estimate(model(), data)[1].samples == 5


@pytest.mark.parametrize(
    "estimator", [Sampled(), Probe(), Probe(draws=4), Hybrid(budget=1.5)], ids=["sampled", "probe", "draws", "hybrid"]
)
def test_the_error_it_reports_is_its_distance_from_exact(estimator: Estimator) -> None:
    subject, data = model(scenario=Scenario.CLASS), examples(200)
    exact = Exact()(subject, data)
    seeds = [replace(estimator, seed=seed).estimate(subject, data) for seed in range(8)]
    true = sum(distance(found, exact) ** 2 for found, _ in seeds) ** 0.5
    reported = sum((report.relative_error or 0) ** 2 for _, report in seeds) ** 0.5
    assert 0.5 < reported / true < 2


def test_the_error_of_few_samples_is_from_all_of_them() -> None:
    subject, data = model(scenario=Scenario.CLASS), examples(12)
    exact = Exact()(subject, data)
    seeds = [Probe(seed=seed).estimate(subject, data) for seed in range(30)]
    true = sum(distance(found, exact) ** 2 for found, _ in seeds) ** 0.5
    assert sum((report.relative_error or 0) ** 2 for _, report in seeds) ** 0.5 == pytest.approx(true, rel=0.3)


def test_a_fisher_of_nothing_has_no_error() -> None:
    assert Probe().estimate(model().requires_grad_(False), examples())[1].relative_error == 0


def test_every_trainable_parameter_is_there_and_no_frozen_one() -> None:
    subject = model("frozen")
    found = Probe()(subject, examples()).values
    trainable = {name: values for name, values in subject.named_parameters() if values.requires_grad}
    assert found.keys() == trainable.keys()
    assert len(trainable) < len(list(subject.parameters()))
    assert all(found[name].shape == values.shape for name, values in trainable.items())


def test_rows_of_the_head_that_do_not_enter_have_no_curvature() -> None:
    head = Exact()(model(), examples()).values["head.weight"]
    assert (head[:5] > 0).any(1).all()
    assert (head[5] == 0).all()


def test_a_model_without_trainable_parameters_has_an_empty_fisher() -> None:
    assert Exact()(model().requires_grad_(False), examples()).values == {}


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_fisher_has_the_precision_of_its_parameters_and_asks_for_no_gradient(precision: torch.dtype) -> None:
    found = Exact()(model().to(precision), examples()).values.values()
    assert {values.dtype for values in found} == {precision}
    assert not any(values.requires_grad for values in found)


def test_neither_autocast_nor_no_grad_around_a_call_changes_it() -> None:
    subject = model("conv").float()
    plain = Exact()(subject, examples())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert distance(Exact()(subject, examples()), plain) == 0


def test_a_model_in_channels_last_has_the_same_fisher() -> None:
    subject = model("conv")
    plain = Exact()(subject, examples())
    subject.preprocess.memory_format = torch.channels_last
    assert distance(Exact()(subject.to(memory_format=torch.channels_last), examples()), plain) < 1e-10


@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if estimator.needs_labels])
def test_labels_that_do_not_enter_are_refused(name: str) -> None:
    data = replace(examples(), labels=torch.full((11,), 4), task_ids=torch.zeros(11, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"fisher={name}: .*task 0: \[0, 1\]; got 4"):
        ESTIMATORS[name](model(), data)


@pytest.mark.parametrize("label", [-1, OUTPUTS])
def test_labels_outside_the_head_are_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"got {label}"):
        Empirical(logits="all")(model(), replace(examples(), labels=torch.full((11,), label)))


@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if not estimator.needs_labels])
def test_labels_are_not_looked_at_where_none_are_needed(name: str) -> None:
    subject, wrong = model(), replace(examples(), labels=torch.full((11,), 99))
    assert distance(ESTIMATORS[name](subject, wrong), ESTIMATORS[name](subject, examples())) == 0


def test_a_task_that_is_not_revealed_is_refused() -> None:
    subject = model()
    subject.visible[1] = False
    with pytest.raises(ValueError, match="no output is active for task 1"):
        Exact()(subject, examples())


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one example .*got none"):
        Exact()(model(), examples(0))


def test_estimators_that_need_labels_give_way_to_a_probe_for_a_pretrained_model() -> None:
    settings = {"pretrained_samples": 20, "batch_size": 3, "logits": "all", "seed": 4}
    for estimator in ESTIMATORS.values():
        stand_in = replace(estimator, num_samples=1000, **settings).for_pretrained()
        assert type(stand_in) is (Probe if estimator.needs_labels else type(estimator))
        assert vars(stand_in).items() >= (settings | {"num_samples": 20}).items()


def test_true_labels_are_refused_under_the_pretrained_head() -> None:
    view = PretrainedView(model(pretrained_head=nn.Linear(FEATURES, 9)))
    with pytest.raises(ValueError, match="for_pretrained"):
        Empirical()(view, examples())


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 1e-3), ("bf16", 5e-3)])
@pytest.mark.parametrize("backbone", ["conv", "depthwise", "groups", "attention", "mlp"])
@pytest.mark.parametrize("name", ["exact", "probe"])
def test_a_lower_precision_of_the_weight_side_costs_little(
    name: str, backbone: str, precision: Precision, bound: float
) -> None:
    subject, data = model(backbone).float(), examples()
    exactly = ESTIMATORS[name](subject, data)
    rounded = replace(ESTIMATORS[name], precision=precision)(subject, data)
    assert distance(rounded, exactly) < bound
    assert (distance(rounded, exactly) > 0) == (backbone != "mlp"), "one position has no sum to round"


@pytest.mark.parametrize("representation", ["kfac", "ekfac", "full"])
def test_other_representations_need_full_precision(representation: Representation) -> None:
    with pytest.raises(ConfigError, match="fisher.precision: expected fp32 for the"):
        Exact(representation=representation, precision="tf32")


def test_an_unknown_representation_is_refused_with_a_list_of_those_there_are() -> None:
    message = "fisher.representation: expected diagonal, kfac, ekfac or full for"
    with pytest.raises(ConfigError, match=message):
        Probe(representation="kronecker")  # type: ignore[arg-type]


def test_a_fisher_is_held_as_asked() -> None:
    subject, data = model(), examples()
    held = [replace(Exact(), representation=name)(subject, data) for name in ("diagonal", "ekfac", "full")]
    assert [type(fisher) for fisher in held] == [Diagonal, Kronecker, Full]
    assert float(held[1].trace()) == pytest.approx(float(held[0].trace())) == float(held[2].trace())


def test_ekfac_takes_the_passes_twice() -> None:
    passes = {
        kind: Exact(representation=kind).estimate(model(), examples())[1].backward_passes for kind in ("kfac", "ekfac")
    }
    assert passes["ekfac"] == 2 * passes["kfac"]


def test_it_takes_any_network_with_a_linear_head() -> None:
    torch.manual_seed(1)
    backbone, head = (
        nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, FEATURES), nn.Tanh()),
        nn.Linear(FEATURES, 3),
    )
    images, labels = torch.randn(10, CHANNELS, SIDE, SIDE), torch.randint(3, (10,))
    found = Exact()(Network(backbone, head), Examples(images, labels, torch.zeros_like(labels)))
    expected = torch.zeros_like(head.weight)
    for image in images:
        log_p = head(backbone(image[None])).log_softmax(1)[0]
        for label in range(3):
            (slope,) = torch.autograd.grad(log_p[label], head.weight, retain_graph=True)
            expected += log_p[label].exp().detach() * slope.square() / len(images)
    torch.testing.assert_close(found.values["head.weight"], expected)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"expected a Classifier, such as models.model.Network\(backbone, head\), got Linear"
    ):
        Exact()(nn.Linear(2, 2), examples())
