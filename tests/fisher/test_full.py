"""The full Fisher: its definition, its algebra, and quadratics merged around one anchor."""

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Empirical, Estimator, Exact, Probe
from cl_runner.fisher.full import LIMIT, Full, OuterProducts
from cl_runner.fisher.quadratic import Penalty
from cl_runner.models.model import Model, Parameters
from cl_runner.streams.base import Examples

from .cases import BACKBONES, FEATURES, PIXELS, UNCOVERED, distance, examples, model
from .holding import held


def whole(estimator: Estimator, model: Model, examples: Examples) -> Full:
    found = held(estimator, model, examples, "full")
    assert isinstance(found, Full)
    return found


def by_definition(model: Model, examples: Examples) -> Tensor:
    """E_x Σ_c p_c s_c s_cᵀ, s_c = ∂ log p_c / ∂θ: one backward pass at a time."""
    model.eval()
    parameters = [values for values in model.parameters() if values.requires_grad]
    total = torch.zeros(()).double()
    for sample in examples.batches(1):
        logits = model.restrict(model(sample.images).logits, sample.task_ids)[0]
        for log_p in logits[logits > -torch.inf].log_softmax(0):
            gradients = torch.autograd.grad(log_p, parameters, retain_graph=True)
            score = torch.cat([gradient.flatten() for gradient in gradients])
            total = total + log_p.exp().detach() * torch.outer(score, score)
    return total / len(examples)


def test_it_is_its_definition() -> None:
    expected = by_definition(model(), examples())
    torch.testing.assert_close(whole(Exact(batch_size=4), model(), examples()).matrix, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backbone", [*BACKBONES, *UNCOVERED])
@pytest.mark.parametrize("estimator", [Exact(batch_size=4), Probe(batch_size=4, draws=3), Empirical(batch_size=4)])
def test_its_diagonal_is_the_diagonal_fisher(estimator: Estimator, backbone: str) -> None:
    subject = model(backbone)
    found, expected = whole(estimator, subject, examples()).diagonal(), estimator(subject, examples())
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_batch_size_changes_nothing(precision: torch.dtype) -> None:
    subject, data = model("batch norm").to(precision), examples(70)
    alone = whole(Exact(batch_size=1), subject, data).matrix
    for batch_size in (7, 64):
        found = whole(Exact(batch_size=batch_size), subject, data).matrix
        assert float((found - alone).norm() / alone.norm()) < 1e-5


def test_a_model_that_is_too_large_is_refused_before_any_memory_is_taken() -> None:
    subject = model(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 300_000), nn.Linear(300_000, FEATURES)).to("meta"))
    with pytest.raises(ConfigError, match=rf"fisher.representation: expected at most {LIMIT:,} .* GB; choose"):
        OuterProducts(subject)


def test_a_layer_that_looks_at_the_whole_batch_is_refused() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.BatchNorm1d(FEATURES, track_running_stats=False))
    with pytest.raises(ValueError, match="statistics of its batch"):
        OuterProducts(model(norm))


def test_a_model_without_trainable_parameters_has_an_empty_fisher() -> None:
    fisher = whole(Exact(), model().requires_grad_(False), examples())
    assert fisher.trace() == fisher.quadratic({}) == 0
    assert fisher.product({}) == fisher.only(()).shapes == {}


SHAPES = {"a": (3, 2), "b": (4,), "c": (2, 1, 2), "d": ()}


def random_full(seed: int, *names: str, rank: int | None = None) -> Full:
    """A random matrix, of full rank unless `rank` is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: SHAPES[name] for name in names}
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    root = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    return Full(root @ root.t(), shapes)


def weights(seed: int = 9, *names: str, dtype: torch.dtype = torch.float64) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPES[name], generator=generator).to(dtype) for name in names or SHAPES}


def flat(values: Parameters, *names: str) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


def test_the_quadratic_is_that_of_the_matrix() -> None:
    fisher, delta = random_full(0, "a", "d", "b"), weights()
    vector = flat(delta, "a", "d", "b")
    torch.testing.assert_close(fisher.quadratic(delta), vector @ fisher.matrix @ vector)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_product_is_half_the_gradient_of_the_quadratic_in_the_weights_precision(precision: torch.dtype) -> None:
    fisher, delta = random_full(0, "a", "b"), weights(dtype=precision)
    for values in delta.values():
        values.requires_grad_()
    fisher.quadratic(delta).backward()
    product = fisher.product(delta)
    assert product.keys() == {"a", "b"}
    for name, values in product.items():
        torch.testing.assert_close(2 * values.detach(), delta[name].grad)


def test_a_sum_of_fishers_has_the_sum_of_their_quadratics() -> None:
    one, other, delta = random_full(0, "a", "b"), random_full(1, "c", "a"), weights()
    expected = one.quadratic(delta) + 0.3 * other.quadratic(delta)
    torch.testing.assert_close(one.plus(other, 0.3).quadratic(delta), expected)


def test_adding_changes_neither_side() -> None:
    one, other = random_full(0, "a", "b"), random_full(1, "a", "b")
    one.plus(other)
    assert torch.equal(one.matrix, random_full(0, "a", "b").matrix)
    assert torch.equal(other.matrix, random_full(1, "a", "b").matrix)


def test_a_scaled_fisher_has_the_scaled_quadratic() -> None:
    fisher, delta = random_full(0, "a", "b"), weights()
    torch.testing.assert_close(fisher.scaled(0.3).quadratic(delta), 0.3 * fisher.quadratic(delta))


def test_a_block_is_what_is_left_where_the_others_do_not_move() -> None:
    fisher, delta = random_full(0, "a", "b", "c"), weights()
    kept = fisher.only({"a", "c", "unknown"})
    assert list(kept.shapes) == ["a", "c"]
    still = delta | {"b": torch.zeros(4).double()}
    torch.testing.assert_close(kept.quadratic({name: delta[name] for name in ("a", "c")}), fisher.quadratic(still))


def test_rows_that_are_left_out_have_no_curvature() -> None:
    fisher, still = random_full(0, "a", "b", "c"), weights()
    kept = fisher.only_rows({"a": torch.tensor([True, False, True]), "b": torch.arange(4) < 1, "absent": torch.ones(1)})
    still["a"][1] = 0
    still["b"][1:] = 0
    torch.testing.assert_close(kept.quadratic(weights()), fisher.quadratic(still))


def test_the_trace_is_that_of_the_matrix() -> None:
    fisher = random_full(0, "a", "b")
    torch.testing.assert_close(fisher.trace(), fisher.diagonal().trace())


def test_a_diagonal_is_not_merged_with_it() -> None:
    fisher, at = random_full(0, "a"), weights(1, "a")
    assert fisher.merged(at, Diagonal({"a": torch.ones(3, 2)}), at) is None
    assert Diagonal({"a": torch.ones(3, 2)}).merged(at, fisher, at) is None


Term = tuple[Full, Parameters]


def penalty_of(given: list[Term]) -> Penalty:
    penalty = Penalty()
    for fisher, anchor in given:
        penalty = penalty.plus(fisher, anchor)
    return penalty


def slow(given: list[Term], live: Parameters) -> Tensor:
    """Term by term, in float64, for autograd to differentiate."""
    parts = [
        fisher.quadratic({name: live[name].double() - anchor[name].double() for name in fisher.shapes})
        for fisher, anchor in given
    ]
    return torch.stack(parts).sum()


def check_merged(given: list[Term], live: Parameters, tolerance: float) -> None:
    """Assert that value and gradient of the merged penalty are those of one term per task."""
    live = {name: values.clone().requires_grad_() for name, values in live.items()}
    penalty, expected = penalty_of(given), slow(given, live)
    assert len(penalty.terms) == 1
    found = penalty(live)
    assert abs(found.item() - expected.item()) <= tolerance * expected.item()
    held = [values for name, values in live.items() if any(name in fisher.shapes for fisher, _ in given)]
    for one, other in zip(torch.autograd.grad(found, held), torch.autograd.grad(expected, held), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.norm()))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_merged_equals_a_term_a_task(seed: int, rank: int | None) -> None:
    """With rank two, no single Fisher has curvature in most directions, and the sum does not in all."""
    names = [("a", "b"), ("b", "c"), ("c", "d", "a")]
    given = [
        (random_full(10 * seed + t, *names[t], rank=rank), weights(20 + 10 * seed + t, *names[t])) for t in range(3)
    ]
    check_merged(given, weights(), 1e-9)


def fishers_of_a_model(precision: torch.dtype) -> tuple[list[Term], Parameters]:
    """Fishers of five tasks whose weights are 1e-3 apart and a thousand times farther from zero; all are singular."""
    subject = model("conv").to(precision)
    start = {name: values.detach().clone() + 1 for name, values in subject.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def moved() -> Parameters:
        return {
            name: values + 1e-3 * torch.randn(values.shape, generator=generator).to(values)
            for name, values in start.items()
        }

    given = [(whole(Exact(), subject, examples(12, seed=task)), moved()) for task in range(5)]
    return given, moved()


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_merging_keeps_its_digits_where_fishers_are_singular_and_anchors_lie_close_together_and_far_from_zero(
    precision: torch.dtype, tolerance: float
) -> None:
    given, live = fishers_of_a_model(precision)
    rank = int((torch.linalg.eigvalsh(sum(fisher.matrix for fisher, _ in given)) > 1e-6).sum())
    assert rank < 0.5 * len(given[0][0].matrix)
    check_merged(given, live, tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_merging_keeps_its_digits_where_tasks_feel_nearly_the_same_directions_and_some_weights_much_more_than_others(
    seed: int,
) -> None:
    """The minimum of such a sum is thousands of times as far from the anchors as they are from each other."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common, scale, start = random(100, 10), torch.logspace(0, -4, 100, dtype=torch.float64)[:, None], 3 * random(100)
    given: list[Term] = []
    for _ in range(5):
        root = (common + 1e-5 * random(100, 10)) * scale
        given.append((Full(root @ root.t(), {"a": (100,)}), {"a": (start + 1e-3 * random(100)).float()}))
    check_merged(given, {"a": (start + 1e-3 * random(100)).float()}, 1e-6)
    (term,) = penalty_of(given).terms
    assert float((term.anchor["a"] - start).norm()) > 1000 * float((given[0][1]["a"] - start).norm())


def test_a_weight_with_next_to_no_curvature_is_held_between_its_anchors_like_any_other() -> None:
    fisher = Full(torch.tensor([1, 1e-20]).double().diag(), {"a": (2,)})
    (term,) = penalty_of([(fisher, {"a": torch.zeros(2)}), (fisher, {"a": torch.ones(2)})]).terms
    torch.testing.assert_close(term.anchor["a"], torch.full((2,), 0.5).double())


def test_where_neither_has_curvature_the_first_anchor_stays() -> None:
    nothing = random_full(0, "a").scaled(0)
    (term,) = penalty_of([(nothing, weights(1, "a")), (nothing, weights(2, "a"))]).terms
    assert torch.equal(term.anchor["a"], weights(1, "a")["a"])
    assert term.constant == 0


def test_a_penalty_comes_back_to_the_last_bit_from_a_file_that_may_hold_no_code() -> None:
    penalty, file = (
        penalty_of([(random_full(seed, "a", "d"), weights(seed, "a", "d")) for seed in (0, 1)]),
        io.BytesIO(),
    )
    torch.save(penalty, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert torch.equal(read.terms[0].curvature.matrix, penalty.terms[0].curvature.matrix)
    assert read.terms[0].curvature.shapes == {"a": (3, 2), "d": ()}
    assert torch.equal(read(weights()), penalty(weights()))


def test_as_many_vectors_as_can_be_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(Exact(), model(), examples())
    monkeypatch.setattr("cl_runner.fisher.full.OUTPUT_NUMBERS", 1)
    found = whole(replace(Exact(), batch_size=5), model(), examples())
    torch.testing.assert_close(found.matrix, expected.matrix)
