"""The algebra of a diagonal Fisher."""

import io

import torch

from cl_runner.fisher.curvature import Diagonal


def diagonal(seed: int, *names: str) -> Diagonal:
    generator = torch.Generator().manual_seed(seed)
    return Diagonal({name: torch.rand(3, 2, generator=generator, dtype=torch.float64) for name in names})


def displacement() -> dict[str, torch.Tensor]:
    return {name: values - 0.5 for name, values in diagonal(9, "a", "b", "c").values.items()}


def test_the_quadratic_is_that_of_the_whole_matrix() -> None:
    fisher, delta = diagonal(0, "a", "b"), displacement()
    flat = torch.cat([delta[name].flatten() for name in fisher.values])
    matrix = torch.diag(torch.cat([values.flatten() for values in fisher.values.values()]))
    torch.testing.assert_close(fisher.quadratic(delta), flat @ matrix @ flat)


def test_the_product_is_half_the_gradient_of_the_quadratic() -> None:
    fisher, delta = diagonal(0, "a", "b"), displacement()
    for values in delta.values():
        values.requires_grad_()
    fisher.quadratic(delta).backward()
    product = fisher.product(delta)
    assert product.keys() == fisher.values.keys()
    for name, values in product.items():
        torch.testing.assert_close(2 * values.detach(), delta[name].grad)
    assert delta["c"].grad is None, "a parameter without curvature is not held"


def test_a_sum_of_fishers_has_the_sum_of_their_quadratics() -> None:
    one, other, delta = diagonal(0, "a", "b"), diagonal(1, "b", "c"), displacement()
    expected = one.quadratic(delta) + 0.3 * other.quadratic(delta)
    torch.testing.assert_close(one.plus(other, 0.3).quadratic(delta), expected)


def test_adding_changes_neither_side() -> None:
    one, other = diagonal(0, "a", "b"), diagonal(1, "b", "c")
    one.plus(other)
    assert one.values.keys() == {"a", "b"}
    assert torch.equal(one.values["b"], diagonal(0, "a", "b").values["b"])


def test_a_scaled_fisher_has_the_scaled_quadratic() -> None:
    fisher, delta = diagonal(0, "a", "b"), displacement()
    torch.testing.assert_close(fisher.scaled(0.3).quadratic(delta), 0.3 * fisher.quadratic(delta))


def test_rows_that_are_left_out_have_no_curvature() -> None:
    fisher, delta = diagonal(0, "a", "b"), displacement()
    kept = fisher.only_rows({"a": torch.tensor([True, False, True]), "absent": torch.tensor([False])})
    delta["a"][1] = 0
    torch.testing.assert_close(kept.quadratic(displacement()), fisher.quadratic(delta))


def test_two_quadratics_are_one_around_the_mean_of_their_anchors() -> None:
    one, other, weights = diagonal(0, "a", "b"), diagonal(1, "b", "c"), displacement()
    at_one, at_other = diagonal(2, "a", "b").values, diagonal(3, "b", "c").values
    both = one.merged(at_one, other, at_other)
    assert both is not None
    fisher, anchor, least = both

    def value(matrix: Diagonal, at: dict[str, torch.Tensor]) -> torch.Tensor:
        return matrix.quadratic({name: weights[name] - at[name] for name in at})

    torch.testing.assert_close(value(fisher, anchor) + least, value(one, at_one) + value(other, at_other))


def test_the_trace_is_the_sum_of_all_values() -> None:
    fisher = diagonal(0, "a", "b")
    torch.testing.assert_close(fisher.trace(), fisher.values["a"].sum() + fisher.values["b"].sum())


def test_an_empty_fisher_holds_nothing() -> None:
    assert Diagonal({}).quadratic(displacement()) == Diagonal({}).trace() == 0
    assert Diagonal({}).product(displacement()) == {}


def test_a_fisher_comes_back_from_a_file_that_may_hold_no_code() -> None:
    file = io.BytesIO()
    torch.save(diagonal(0, "a"), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert torch.equal(read.values["a"], diagonal(0, "a").values["a"])
