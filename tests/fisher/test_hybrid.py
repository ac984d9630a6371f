"""What is specific to the hybrid; that it meets its definition is tested in test_estimators."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.engine import undisturbed
from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.fisher.hybrid import Columns, Hybrid, Plan, bias_error, expected_passes, plan_of, threshold_for_budget
from cl_runner.models.model import Model
from cl_runner.streams.base import Scenario

from .cases import distance, examples, model
from .test_estimators import by_definition


def sure_model(scenario: Scenario = Scenario.CLASS, lead: float = 4.0) -> Model:
    subject = model(scenario=scenario)
    with torch.no_grad():
        subject.head.weight *= lead
    return subject


def rms_error(estimator: Hybrid | Probe, subject: Model, expected: Diagonal, count: int = 200, seeds: int = 8) -> float:
    found = [distance(replace(estimator, seed=seed)(subject, examples(count)), expected) for seed in range(seeds)]
    return (sum(error**2 for error in found) / seeds) ** 0.5


def logits(count: int = 300, outputs: int = 10, spread: float = 4.0) -> Tensor:
    return spread * torch.randn(count, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_is_exact_where_every_column_is_heavy() -> None:
    subject = sure_model()
    assert distance(Hybrid(budget=100.0)(subject, examples()), Exact()(subject, examples())) < 1e-10
    assert distance(Hybrid(tolerance=1e-9)(subject, examples()), Exact()(subject, examples())) < 1e-7


@pytest.mark.parametrize("budget", [0.7, 1.2, 2.0])
def test_it_is_its_definition_where_samples_differ_in_what_is_done_with_them(budget: float) -> None:
    subject, data, estimator = sure_model(lead=8), examples(60), Hybrid(budget=budget, batch_size=7)
    with undisturbed(subject):
        plan = plan_of(estimator.prepared(subject, data))
    heavy, rates = plan.heavy.any(1), plan.rates
    assert (heavy & (rates > 0) & ~plan.whole).any()
    assert ((rates < 1) & ~plan.whole).any()
    assert ((rates > 1) & ~plan.whole).any()
    assert plan.whole.any() == (budget > 1)
    assert distance(estimator(subject, data), by_definition(estimator, subject, data)) < 1e-10


def test_the_columns_make_up_the_output_fisher() -> None:
    columns = Columns.of(logits())
    torch.testing.assert_close(columns.weights.sum(1), (columns.p * (1 - columns.p)).sum(1))


def test_a_task_of_two_classes_is_exact_in_one_pass() -> None:
    subject, data = model(), examples(20)
    data = data[data.task_ids == 0]
    found, report = Hybrid().estimate(subject, data)
    assert distance(found, Exact()(subject, data)) < 1e-10
    assert report.backward_passes == len(data)
    assert report.relative_error is None


@pytest.mark.parametrize(
    ("budget", "scenario"), [(0.2, Scenario.CLASS), (0.7, Scenario.TASK), (0.7, Scenario.CLASS), (2.0, Scenario.CLASS)]
)
def test_it_is_exact_on_average(budget: float, scenario: Scenario) -> None:
    subject, data = model(scenario=scenario), examples(8)
    expected = Exact()(subject, data)
    found = [Hybrid(budget=budget, seed=seed)(subject, data) for seed in range(80)]
    for name, values in expected.values.items():
        draws = torch.stack([fisher.values[name].flatten() for fisher in found])
        direction = values.flatten() / values.norm()
        along = draws @ direction
        assert float((along.mean() - values.norm()).abs()) < 4 * float(along.std()) / 80**0.5, name


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0, 3.0])
def test_the_expected_passes_are_the_budget(budget: float) -> None:
    columns = Columns.of(logits())
    assert expected_passes(columns, threshold_for_budget(columns, budget)) == pytest.approx(budget, rel=1e-4)


def test_a_budget_that_suffices_for_exact_is_not_spent() -> None:
    columns = Columns.of(logits())
    assert expected_passes(columns, threshold_for_budget(columns, 20)) == 9


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_the_passes_made_are_the_budget_and_few_of_them_are_for_zeros(budget: float) -> None:
    passes = Hybrid(budget=budget).estimate(sure_model(), examples(400))[1].backward_passes
    assert 0.85 * budget < passes / 400 < 1.2 * budget


def test_samples_without_a_vector_take_no_pass_and_count_all_the_same() -> None:
    subject, seen = sure_model(lead=10), []
    subject.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    report = Hybrid(budget=0.05).estimate(subject, examples(400))[1]
    assert report.samples == 400
    assert report.backward_passes < 40
    assert sum(seen) < 400 + 2 * 40 + 16  # first a forward pass over all; the error takes two more over sixteen


def test_of_a_model_that_is_sure_it_says_far_more_than_a_probe_of_the_same_cost() -> None:
    subject = sure_model(lead=16)
    expected = Exact()(subject, examples(200))
    assert rms_error(Hybrid(budget=1.0), subject, expected) < 0.5 * rms_error(Probe(), subject, expected)


def test_of_any_model_more_passes_mean_less_error() -> None:
    subject = model(scenario=Scenario.CLASS)
    expected = Exact()(subject, examples(200))
    errors = [rms_error(Hybrid(budget=budget), subject, expected) for budget in (0.25, 1.0, 3.0)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


@pytest.mark.parametrize("tolerance", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("lead", [1.0, 4.0])
def test_a_tolerance_is_the_error_of_the_output_biases_and_of_the_order_of_all(tolerance: float, lead: float) -> None:
    subject, data = sure_model(lead=lead), examples(200)
    expected = Exact()(subject, data)
    biases, whole = [], []
    for seed in range(10):
        found = Hybrid(tolerance=tolerance, seed=seed)(subject, data)
        biases.append(distance(found.only({"head.bias"}), expected.only({"head.bias"})) ** 2)
        whole.append(distance(found, expected) ** 2)
    assert (sum(biases) / 10) ** 0.5 == pytest.approx(tolerance, rel=0.5)
    assert tolerance / 3 < (sum(whole) / 10) ** 0.5 < 3 * tolerance


def test_the_error_of_the_biases_is_that_of_many_draws() -> None:
    outputs = logits(count=40, outputs=5, spread=2.0)
    columns = Columns.of(outputs)
    threshold = threshold_for_budget(columns, 0.8)
    plan, p, generator = Plan.of(columns, threshold), columns.p, torch.Generator().manual_seed(0)
    exact = (p * (1 - p)).sum(0)
    light = (~plan.heavy & ~plan.whole[:, None]).double()
    squares = []
    for _ in range(1000):
        probes = (plan.rates + torch.rand(40, dtype=torch.float64, generator=generator)).floor()
        total = torch.zeros(5, dtype=torch.float64)
        for index in range(int(probes.max())):
            signs = 2.0 * torch.randint(2, p.shape, generator=generator).double() - 1
            z = light * signs * p.sqrt()
            z = z - p * z.sum(1, keepdim=True)
            divisors = torch.where(plan.rates < 1, plan.rates, probes).clamp_min(1e-30)
            total += (z.square() / divisors[:, None] * (index < probes)[:, None]).sum(0)
        others = light * p * (1 - 2 * p) + p.square() * (light * p).sum(1, keepdim=True)
        squares.append((total - others.sum(0)).square().sum())
    measured = float((torch.stack(squares).mean() / exact.square().sum()).sqrt())
    assert bias_error(columns, threshold) == pytest.approx(measured, rel=0.15)


def test_a_model_that_is_sure_beyond_its_precision_has_no_fisher_and_needs_no_pass() -> None:
    subject = model("linear", Scenario.CLASS).float()
    with torch.no_grad():
        subject.head.bias[0] += 300
    for estimator in (Hybrid(), Hybrid(tolerance=0.1)):
        found, report = estimator.estimate(subject, examples())
        assert (float(found.trace()), report.backward_passes) == (0, 0)
        assert not report.relative_error


def test_kfac_is_refused_since_most_samples_are_not_looked_at() -> None:
    with pytest.raises(
        ConfigError, match=r"fisher\.representation: expected diagonal, ekfac or full for hybrid, got kfac"
    ):
        Hybrid(representation="kfac")


def test_the_most_passes_are_known_beforehand() -> None:
    assert [Hybrid(budget=budget).passes(10) for budget in (0.25, 1.0, 2.5, 50.0)] == [1, 1, 3, 9]
    assert Hybrid(tolerance=0.1).passes(10) == 9


def test_the_plan_is_made_of_the_logits_that_enter() -> None:
    subject = model()
    with undisturbed(subject):
        prepared = Hybrid().prepared(subject, examples())
    plan = plan_of(prepared)
    assert torch.equal(plan.outputs, torch.where(examples().task_ids == 0, 2, 3))
    assert not (plan.heavy & (prepared.extras["logits"] == -torch.inf)).any()
