"""A sum of quadratics, merged and differentiated in closed form, against the slow and obvious one."""

import io

import pytest
import torch
from torch import Tensor

from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.quadratic import Penalty, Quadratic
from cl_runner.models.model import Parameters

SHAPES = {"a": (5, 3), "b": (4,), "c": (2, 3, 2, 2), "d": ()}


class PerTask(Diagonal):
    """A curvature that cannot be merged with another."""

    def merged(self, anchor, other, other_anchor):
        return None


def terms(seed: int, count: int = 6, dtype=torch.float64, kind=Diagonal) -> list[tuple[Diagonal, Parameters]]:
    """Random terms that each cover some of the parameters, without curvature in some rows and weights."""
    generator = torch.Generator().manual_seed(seed)

    def term() -> tuple[Diagonal, Parameters]:
        names = [name for name in SHAPES if torch.rand((), generator=generator) < 0.7] or ["a"]
        values = {name: torch.rand(SHAPES[name], generator=generator, dtype=dtype) for name in names}
        for fisher in values.values():
            fisher *= torch.rand(fisher.shape, generator=generator) < 0.7
        anchor = {name: torch.randn(SHAPES[name], generator=generator, dtype=dtype) for name in names}
        rows = {"a": torch.rand(5, generator=generator) < 0.6}
        return kind(Diagonal(values).only_rows(rows).values), anchor

    return [term() for _ in range(count)]


def weights(dtype=torch.float64) -> Parameters:
    generator = torch.Generator().manual_seed(77)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in SHAPES.items()
    }


def penalty_of(given: list[tuple[Diagonal, Parameters]]) -> Penalty:
    penalty = Penalty()
    for curvature, anchor in given:
        penalty = penalty.plus(curvature, anchor)
    return penalty


def slow(given: list[tuple[Diagonal, Parameters]], live: Parameters) -> Tensor:
    """The definition, term by term, for autograd to differentiate."""
    parts = [
        (values * (live[name] - anchor[name]) ** 2).sum()
        for curvature, anchor in given
        for name, values in curvature.values.items()
    ]
    return torch.stack(parts).sum()


def gradients(value: Tensor, live: Parameters) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(live.values()), allow_unused=True))


@pytest.mark.parametrize("seed", range(10))
def test_what_is_merged_equals_a_term_a_task(seed):
    given, live = terms(seed), weights()
    penalty = penalty_of(given)
    assert len(penalty.terms) == 1
    torch.testing.assert_close(penalty(live), slow(given, live), rtol=1e-12, atol=0)
    for found, expected in zip(gradients(penalty(live), live), gradients(slow(given, live), live), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_be_merged_adds_up_all_the_same(seed):
    given, live = terms(seed, kind=PerTask), weights()
    penalty = penalty_of(given)
    assert len(penalty.terms) == len(given)
    torch.testing.assert_close(penalty(live), slow(given, live), rtol=1e-12, atol=0)
    for found, expected in zip(gradients(penalty(live), live), gradients(slow(given, live), live), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [Diagonal, PerTask])
def test_the_gradient_passes_gradcheck(kind):
    penalty, live = penalty_of(terms(3, kind=kind)), weights()
    names = [name for name in SHAPES if any(name in term.anchor for term in penalty.terms)]
    assert torch.autograd.gradcheck(
        lambda *values: 0.3 * penalty(dict(zip(names, values, strict=True))), [live[name] for name in names]
    )


def close_anchors_far_from_zero() -> tuple[list[tuple[Diagonal, Parameters]], Parameters]:
    """Ten tasks' weights 1e-3 apart, around 3: float32 resolves the distance between them to a part in ten thousand."""
    generator = torch.Generator().manual_seed(0)
    start = 3 + torch.randn(1000, generator=generator)
    anchors = [{"a": start + 1e-3 * torch.randn(1000, generator=generator)} for _ in range(10)]
    given = [(Diagonal({"a": torch.rand(1000, generator=generator)}), anchor) for anchor in anchors]
    return given, {"a": start + 1e-3 * torch.randn(1000, generator=generator)}


def test_the_value_of_a_large_layer_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    given = [(Diagonal({"a": torch.rand(2_400_000, generator=generator)}), {"a": torch.zeros(2_400_000)})]
    live = {"a": torch.randn(2_400_000, generator=generator)}
    torch.testing.assert_close(penalty_of(given)(live).double(), in_double(given, live), rtol=1e-6, atol=0)


def in_double(given: list[tuple[Diagonal, Parameters]], live: Parameters) -> Tensor:
    exact = [(Diagonal({"a": fisher.values["a"].double()}), {"a": at["a"].double()}) for fisher, at in given]
    return slow(exact, {"a": live["a"].double()})


def test_merging_keeps_its_digits_where_anchors_lie_close_together_and_far_from_zero():
    given, live = close_anchors_far_from_zero()
    torch.testing.assert_close(penalty_of(given)(live).double(), in_double(given, live), rtol=3e-5, atol=0)


def test_the_shorter_form_would_lose_all_its_digits_there():
    given, live = close_anchors_far_from_zero()
    fishers = torch.stack([fisher.values["a"] for fisher, _ in given])
    anchors = torch.stack([at["a"] for _, at in given])
    matrix, linear, constant = fishers.sum(0), (fishers * anchors).sum(0), (fishers * anchors**2).sum()
    shorter = (matrix * live["a"] ** 2).sum() - 2 * (linear * live["a"]).sum() + constant
    expected = in_double(given, live)
    assert abs(shorter - expected) > 0.02 * expected


def test_the_least_value_is_the_distance_between_the_anchors():
    given = [
        (Diagonal({"b": torch.full((1,), fisher)}), {"b": torch.tensor([at])})
        for fisher, at in ((1.0, 0.0), (3.0, 2.0))
    ]
    (term,) = penalty_of(given).terms
    assert term.anchor["b"] == 1.5  # (1 * 0 + 3 * 2) / 4
    assert term.constant == 3.0  # 1 * 1.5² + 3 * 0.5²


def test_where_neither_has_curvature_the_first_anchor_stays():
    first, second = (Diagonal({"b": torch.tensor([0.0, value])}) for value in (0.0, 1.0))
    (term,) = penalty_of([(first, {"b": torch.ones(2)}), (second, {"b": torch.full((2,), 7.3)})]).terms
    assert torch.equal(term.anchor["b"], torch.tensor([1, 7.3]))
    assert term.constant == 0


def test_a_weight_with_curvature_in_one_term_alone_keeps_its_anchor_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    one, two = (1e4 * torch.randn(1000, generator=generator), torch.randn(1000, generator=generator))
    fisher, none = Diagonal({"a": torch.rand(1000, generator=generator) + 0.1}), Diagonal({"a": torch.zeros(1000)})
    (term,) = penalty_of([(none, {"a": one}), (fisher, {"a": two})]).terms
    assert torch.equal(term.anchor["a"], two)
    (term,) = penalty_of([(fisher, {"a": two}), (none, {"a": one})]).terms
    assert torch.equal(term.anchor["a"], two)


def test_adding_leaves_what_was_added_and_what_was_there_alone():
    given = terms(0, count=3)
    before = penalty_of(given[:2])
    kept = [value.clone() for value in tensors(before)]
    copies = [({n: v.clone() for n, v in F.values.items()}, {n: v.clone() for n, v in at.items()}) for F, at in given]
    before.plus(*given[2])(weights()).backward()
    assert all(torch.equal(one, other) for one, other in zip(kept, tensors(before), strict=True))
    for (fisher, anchor), (values, at) in zip(given, copies, strict=True):
        assert all(torch.equal(fisher.values[name], values[name]) for name in values)
        assert all(torch.equal(anchor[name], at[name]) for name in at)


def tensors(penalty: Penalty) -> list[Tensor]:
    return [
        value
        for term in penalty.terms
        for value in (term.constant, *term.anchor.values(), *term.curvature.values.values())
    ]


@pytest.mark.parametrize("kind", [Diagonal, PerTask])
def test_the_value_and_its_gradient_leave_everything_alone(kind):
    penalty, live = penalty_of(terms(1, kind=kind)), weights()
    before = [value.detach().clone() for value in [*tensors(penalty), *live.values()]]
    first, second = gradients(penalty(live), live), gradients(penalty(live), live)
    assert all(torch.equal(one, other) for one, other in zip(before, [*tensors(penalty), *live.values()], strict=True))
    assert all(one is None or torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_backward_pass_leaves_the_graph_as_it_was():
    penalty, live = penalty_of(terms(1)), weights()
    value = penalty(live)
    first = torch.autograd.grad(value, live["a"], retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(value, live["a"])[0])


def test_the_gradient_joins_the_losss_own():
    given, live = terms(2), weights()
    penalty = penalty_of(given)
    (penalty(live) + live["a"].sin().sum()).backward()
    expected = weights()
    (slow(given, expected) + expected["a"].sin().sum()).backward()
    torch.testing.assert_close(live["a"].grad, expected["a"].grad)


def test_frozen_parameters_count_and_take_no_gradient():
    given, live = terms(2), weights()
    live["a"].requires_grad_(False)
    penalty = penalty_of(given)
    torch.testing.assert_close(penalty(live), slow(given, live))
    penalty(live).backward()
    assert live["a"].grad is None
    assert live["b"].grad is not None
    assert not penalty({name: value.detach() for name, value in live.items()}).requires_grad


def test_channels_last_weights_get_gradients_that_lie_as_they_do():
    given, live = terms(4), weights()
    live["c"] = live["c"].detach().to(memory_format=torch.channels_last).requires_grad_()
    value, expected = slow(given, live).detach(), gradients(slow(given, live), live)[2]
    for fisher, at in given:  # as the estimators return them
        for values in (fisher.values, at):
            values.update({name: torch.empty_like(live[name]).copy_(value).detach() for name, value in values.items()})
    (term,) = penalty_of(given).terms
    torch.testing.assert_close(penalty_of(given)(live), value)
    found = gradients(penalty_of(given)(live), live)[2]
    torch.testing.assert_close(found, expected)
    assert isinstance(term.curvature, Diagonal)
    assert term.curvature.values["c"].stride() == term.anchor["c"].stride() == live["c"].stride() == found.stride()


def test_curvature_that_lies_in_another_order_than_the_weights_gives_the_same():
    given, live = terms(4), weights()
    expected = slow(given, live)
    live["c"] = live["c"].detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(penalty_of(given)(live), expected)


def test_autocast_does_not_round_the_value():
    penalty, live = penalty_of(terms(1, dtype=torch.float32, kind=Dense)), weights(torch.float32)
    exact = penalty(live)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penalty(live), exact)


class Dense(Diagonal):
    """The same matrix, multiplied as a dense one: autocast rounds matrix products."""

    def product(self, delta):
        return {
            name: (delta[name].reshape(1, -1) @ F.reshape(-1).diag()).view(F.shape) for name, F in self.values.items()
        }

    def merged(self, anchor, other, other_anchor):
        return None


def test_the_penalty_does_not_grow_with_the_number_of_tasks():
    numbers = {count: len(tensors(penalty_of(terms(0, count=count)))) for count in (6, 24)}
    assert numbers[6] == numbers[24]


def test_a_curvature_of_nothing_costs_nothing():
    assert Penalty().plus(Diagonal({}), {})({}) == 0


def test_a_penalty_comes_back_from_a_file_that_may_hold_no_code():
    penalty, file = penalty_of(terms(0)), io.BytesIO()
    torch.save(penalty, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert isinstance(read.terms[0], Quadratic)
    assert torch.equal(read(weights()), penalty(weights()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Diagonal, PerTask])
def test_the_device_says_what_the_cpu_says_and_nothing_waits_for_it(kind):
    given, live = terms(5, kind=kind), weights()
    expected = slow(given, live)
    expected.backward()
    penalty = penalty_of([(kind(on_device(fisher.values)), on_device(anchor)) for fisher, anchor in given])
    there = {name: value.requires_grad_() for name, value in on_device(live).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = penalty(there)
        (0.3 * value).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)
    for name, parameter in there.items():
        torch.testing.assert_close(parameter.grad.cpu(), 0.3 * live[name].grad)


def on_device(values: Parameters) -> Parameters:
    return {name: value.detach().cuda() for name, value in values.items()}
