"""Kronecker factors of a Fisher, against the full matrix where they are exact, else against their definition."""

import io
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.fisher import kronecker
from cl_runner.fisher.curvature import Curvature, Diagonal
from cl_runner.fisher.estimators import Estimator, Exact
from cl_runner.fisher.full import Full
from cl_runner.fisher.kronecker import Block, Factors, Kronecker, Rotated
from cl_runner.fisher.quadratic import Penalty
from cl_runner.fisher.representations import Representation, rounds
from cl_runner.models.model import Model, Parameters
from cl_runner.streams.base import Examples

from .cases import BACKBONES, CHANNELS, FEATURES, OUTPUTS, SIDE, distance, examples, mlp, model
from .holding import dense, held

Kind = Literal["kfac", "ekfac"]
KINDS = get_args(Kind)
both_kinds = pytest.mark.parametrize("kind", KINDS)


def factored(kind: Kind, model: Model, examples: Examples, estimator: Estimator | None = None) -> Kronecker:
    found = held(estimator or Exact(batch_size=4), model, examples, kind)
    assert isinstance(found, Kronecker)
    return found


def whole(model: Model, examples: Examples) -> Full:
    found = held(Exact(), model, examples, "full")
    assert isinstance(found, Full)
    return found


def without_pairs_of_layers(full: Full, like: Kronecker) -> Tensor:
    """The matrix of `full` with the zeros that `like` has by construction."""
    kept = torch.zeros_like(full.matrix)
    for block in like.blocks:
        ones = {name: torch.full(shape, float(name in block.shapes)) for name, shape in full.shapes.items()}
        member = torch.cat([values.flatten() for values in ones.values()])
        kept += torch.outer(member, member)
    rest = [torch.full(shape, float(name in like.rest.values)).flatten() for name, shape in full.shapes.items()]
    return full.matrix * (kept + torch.cat(rest).diag())


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


ONE_POSITION = {
    "linear": BACKBONES["linear"],
    "mlp": mlp,
    "frozen": BACKBONES["frozen"],
    "conv": lambda: nn.Sequential(nn.Conv2d(CHANNELS, FEATURES, (SIDE, SIDE)), nn.Tanh(), nn.Flatten()),
}


@both_kinds
@pytest.mark.parametrize("backbone", ONE_POSITION)
def test_of_one_sample_its_blocks_are_exact(backbone: str, kind: Kind) -> None:
    subject, data = model(ONE_POSITION[backbone]()), examples(1)
    found, full = factored(kind, subject, data), whole(subject, data)
    assert off(dense(found, full.shapes), without_pairs_of_layers(full, found)) < 1e-10


@both_kinds
def test_of_a_linear_layer_alone_and_one_sample_it_is_the_whole_fisher(kind: Kind) -> None:
    subject, data = model(mlp().requires_grad_(False)), examples(1)
    full = whole(subject, data)
    assert full.shapes.keys() == {"head.weight", "head.bias"}
    assert off(dense(factored(kind, subject, data), full.shapes), full.matrix) < 1e-10


@both_kinds
def test_of_a_deep_linear_model_its_blocks_are_exact_where_the_output_vectors_are_the_same_for_every_sample(
    kind: Kind,
) -> None:
    """As they are for a squared error (Martens & Grosse, 2015, section 3.2)."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE**2, 5), nn.Linear(5, FEATURES, bias=False))
    subject, data = model(layers).eval(), examples(30)
    full, blocks = constant_vectors(subject, data, "full"), constant_vectors(subject, data, kind)
    assert isinstance(full, Full)
    assert isinstance(blocks, Kronecker)
    assert off(dense(blocks, full.shapes), without_pairs_of_layers(full, blocks)) < 1e-10


def constant_vectors(model: Model, examples: Examples, representation: Representation) -> Curvature:
    fixed = torch.randn(3, OUTPUTS, generator=torch.Generator().manual_seed(0)).double()
    for accumulator in rounds(model, representation):
        for batch in examples.batches(7):
            inputs = model.preprocess(batch.images)
            accumulator.add(inputs, 3, lambda rows, logits: fixed.expand(len(logits), -1, -1))
    return accumulator.curvature()


def slow_factors(model: Model, layer: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
    """A and G of a linear layer or convolution, one sample, class and position at a time."""
    seen: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [inputs[0].detach(), output]

    handle = layer.register_forward_hook(see)
    inputs, outputs, positions = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for sample in examples.batches(1):
        logits = model.eval().restrict(model(sample.images).logits, sample.task_ids)[0]
        for a in patches(layer, seen[0]):
            inputs, positions = inputs + torch.outer(a, a), positions + 1
        for log_p in logits[logits > -torch.inf].log_softmax(0):
            (gradient,) = torch.autograd.grad(log_p, seen[1], retain_graph=True)
            for g in gradient.reshape(-1, gradient.shape[-1]) if gradient.dim() < 4 else gradient[0].flatten(1).t():
                outputs = outputs + log_p.exp().detach() * torch.outer(g, g)
    handle.remove()
    return inputs / positions, outputs / len(examples)


def patches(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What the layer saw at every position of one sample, with a 1 for its bias."""
    one = torch.ones(1).double()
    if isinstance(layer, nn.Linear):
        return [torch.cat([a, one]) for a in inputs.reshape(-1, inputs.shape[-1])]
    assert isinstance(layer, nn.Conv2d)
    (h, w), (down, right) = layer.kernel_size, layer.stride
    padded = F.pad(inputs[0], (int(layer.padding[1]),) * 2 + (int(layer.padding[0]),) * 2)
    rows, columns = range(0, padded.shape[1] - h + 1, down), range(0, padded.shape[2] - w + 1, right)
    return [torch.cat([padded[:, y : y + h, x : x + w].flatten(), one]) for y in rows for x in columns]


class Tokens(nn.Module):
    """Pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.project = nn.Linear(CHANNELS, 5), nn.Linear(5, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.project(self.enter(inputs.flatten(2).transpose(1, 2)).tanh()).tanh().mean(1)


POSITIONS = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 5, (3, 2), padding=(1, 0), stride=(1, 2)), nn.Tanh(), nn.Conv2d(5, FEATURES, 1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "tokens": Tokens,
}  # fmt: skip


@pytest.mark.parametrize("backbone", POSITIONS)
def test_the_factors_are_their_definition_over_tokens_and_patches(backbone: str) -> None:
    subject, data = model(POSITIONS[backbone]()), examples(5)
    blocks = {next(iter(block.shapes)): block.matrix for block in factored("kfac", subject, data).blocks}
    layers = {f"{name}.weight": layer for name, layer in subject.named_modules() if hasattr(layer, "weight")}
    assert blocks.keys() == layers.keys()
    for name, matrix in blocks.items():
        inputs, outputs = slow_factors(subject, layers[name], data)
        assert isinstance(matrix, Factors)
        torch.testing.assert_close(matrix.inputs, inputs)
        torch.testing.assert_close(matrix.outputs, outputs)


@pytest.mark.parametrize("backbone", [*BACKBONES, Tokens])
def test_ekfac_has_the_true_trace_and_is_never_farther_from_the_whole_than_kfac_or_the_diagonal(
    backbone: str | type[nn.Module],
) -> None:
    subject, data = model(backbone if isinstance(backbone, str) else backbone()), examples(40)
    full = whole(subject, data)
    kfac, ekfac = (dense(factored(kind, subject, data), full.shapes) for kind in ("kfac", "ekfac"))
    assert float(ekfac.trace() / full.trace()) == pytest.approx(1, abs=1e-10)
    assert off(ekfac, full.matrix) <= off(kfac, full.matrix)
    assert off(ekfac, full.matrix) < off(full.matrix.diagonal().diag(), full.matrix)


@both_kinds
def test_it_is_symmetric_and_positive(kind: Kind) -> None:
    subject, data = model("conv"), examples()
    matrix = dense(factored(kind, subject, data), whole(subject, data).shapes)
    torch.testing.assert_close(matrix, matrix.t())
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12 * float(matrix.norm())


@both_kinds
def test_of_a_small_mlp_the_quadratic_is_close_to_that_of_the_whole_within_layers(kind: Kind) -> None:
    """Along steps of high curvature, where the diagonal is far off."""
    subject, data = model("mlp"), examples(200)
    full = whole(subject, data)
    found = factored(kind, subject, data)
    expected = without_pairs_of_layers(full, found)
    steps = torch.randn(20, len(expected), generator=torch.Generator().manual_seed(0)).double() @ expected

    def error(fisher: Kronecker | Diagonal) -> float:
        ratios = [fisher.quadratic(full._named(step)) / (step @ expected @ step) for step in steps]
        return float((torch.stack(ratios) - 1).abs().mean())

    assert error(found) < 0.25
    assert error(full.diagonal()) > 0.75


@both_kinds
@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_has_no_factors_keeps_its_diagonal(backbone: str, kind: Kind) -> None:
    subject, data = model(backbone), examples()
    found, expected = factored(kind, subject, data), Exact()(subject, data)
    own = {name: values for name, values in expected.values.items() if name in found.rest.values}
    assert found.diagonal().values.keys() == expected.values.keys()
    assert [name for name in found.rest.values if any(name in block.shapes for block in found.blocks)] == []
    if own:
        assert distance(found.rest, Diagonal(own)) < 1e-12


WITHOUT_FACTORS = {
    "conv": set(),
    "depthwise": {"backbone.0.weight", "backbone.0.bias"},
    "groups": {"backbone.0.weight", "backbone.0.bias"},
    "batch norm": {"backbone.1.weight", "backbone.1.bias"},
    "layer norm": {"backbone.0.weight", "backbone.0.bias"},
    "attention": set(),
    "called twice": {"backbone.repeated.weight", "backbone.repeated.bias"},
    "tied": {"backbone.first.weight", "backbone.first.bias", "backbone.second.bias"},
    "bare parameters": {"backbone.scale", "backbone.unused"},
    "frozen": set(),
}


@pytest.mark.parametrize("backbone", WITHOUT_FACTORS)
def test_linear_layers_and_plain_convolutions_have_factors(backbone: str) -> None:
    assert factored("kfac", model(backbone), examples(3)).rest.values.keys() == WITHOUT_FACTORS[backbone]


@both_kinds
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_batch_size_changes_nothing(precision: torch.dtype, kind: Kind) -> None:
    subject, data = model("attention").to(precision), examples(70)
    shapes = {name: tuple(values.shape) for name, values in subject.named_parameters()}
    one, seven, all_ = (
        dense(factored(kind, subject, data, Exact(batch_size=size)), shapes, precision) for size in (1, 7, 64)
    )
    assert one.dtype == precision
    assert off(seven, one) < 1e-5
    assert off(all_, one) < 1e-5


@both_kinds
def test_few_samples_at_a_time_are_enough(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = model("called twice"), examples()
    shapes = whole(subject, data).shapes
    expected = dense(factored(kind, subject, data), shapes)
    monkeypatch.setattr(kronecker, "HELD", 1)
    torch.testing.assert_close(dense(factored(kind, subject, data), shapes), expected)


class Squared(nn.Module):
    """A weight that is used in a way that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS * SIDE**2, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs.flatten(1), self.enter.weight**2)


def test_a_model_whose_layers_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="fisher.representation: expected diagonal or full .*enter.weight is used in pow"
    ):
        factored("kfac", model(Squared()), examples())


def test_a_model_without_trainable_parameters_has_an_empty_fisher() -> None:
    for kind in KINDS:
        fisher = factored(kind, model().requires_grad_(False), examples())
        assert fisher.trace() == fisher.quadratic({}) == 0
        assert fisher.product({}) == {}


# ---- its algebra

SHAPES = {"w": (3, 2, 2), "b": (3,), "v": (2, 3), "n": (4,)}


def random_kronecker(seed: int, kind: Kind) -> Kronecker:
    """A layer with a bias, one without, and a norm."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def matrix(outputs: int, inputs: int) -> Factors | Rotated:
        if kind == "kfac":
            roots = random(outputs, outputs), random(inputs, inputs)
            return Factors(*(root @ root.t() for root in roots))
        bases = (torch.linalg.qr(random(size, size)).Q for size in (outputs, inputs))
        return Rotated(*bases, random(outputs, inputs).square())

    blocks = Block(matrix(3, 5), {name: SHAPES[name] for name in "wb"}), Block(matrix(2, 3), {"v": SHAPES["v"]})
    return Kronecker(blocks, Diagonal({"n": random(4).square()}))


def displacement(seed: int = 9) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


@both_kinds
def test_the_product_is_half_the_gradient_of_the_quadratic(kind: Kind) -> None:
    fisher, delta = random_kronecker(0, kind), displacement()
    for values in delta.values():
        values.requires_grad_()
    fisher.quadratic(delta).backward()
    for name, values in fisher.product(delta).items():
        torch.testing.assert_close(2 * values.detach(), delta[name].grad)


@both_kinds
def test_its_diagonal_and_its_trace_are_those_of_its_matrix(kind: Kind) -> None:
    fisher = random_kronecker(0, kind)
    expected = dense(fisher, SHAPES).diagonal()
    torch.testing.assert_close(torch.cat([fisher.diagonal().values[name].flatten() for name in SHAPES]), expected)
    torch.testing.assert_close(fisher.trace(), expected.sum())


@both_kinds
def test_a_sum_of_fishers_is_exact_and_grows(kind: Kind) -> None:
    one, other = random_kronecker(0, kind), random_kronecker(1, kind)
    total = one.plus(other, 0.3)
    torch.testing.assert_close(dense(total, SHAPES), dense(one, SHAPES) + 0.3 * dense(other, SHAPES))
    assert len(total.blocks) == 4
    torch.testing.assert_close(dense(one, SHAPES), dense(random_kronecker(0, kind), SHAPES))


@both_kinds
def test_a_scaled_fisher_has_the_scaled_matrix(kind: Kind) -> None:
    fisher = random_kronecker(0, kind)
    torch.testing.assert_close(dense(fisher.scaled(0.3), SHAPES), 0.3 * dense(fisher, SHAPES))


@both_kinds
@pytest.mark.parametrize("names", [{"w", "n"}, {"b", "v"}, {"n"}, {"w", "b", "v", "n", "unknown"}])
def test_a_block_of_some_parameters_is_what_is_left_where_the_others_do_not_move(names: set[str], kind: Kind) -> None:
    fisher, delta = random_kronecker(0, kind), displacement()
    still = {name: values if name in names else torch.zeros_like(values) for name, values in delta.items()}
    kept = fisher.only(names)
    moved = {name: values for name, values in delta.items() if name in names}
    assert kept.product(moved).keys() == moved.keys()
    torch.testing.assert_close(kept.quadratic(moved), fisher.quadratic(still))


@both_kinds
def test_rows_that_are_left_out_have_no_curvature(kind: Kind) -> None:
    fisher, still = random_kronecker(0, kind), displacement()
    rows = {"w": torch.tensor([True, False, True]), "b": torch.tensor([True, False, False]), "absent": torch.ones(1)}
    still["w"][1] = 0
    still["b"][1:] = 0
    kept = fisher.only_rows(rows)
    torch.testing.assert_close(kept.quadratic(displacement()), fisher.quadratic(still))
    assert not kept.product(displacement())["b"][1:].any()
    torch.testing.assert_close(kept.trace(), dense(kept, SHAPES).trace())
    only = {name: values for name, values in displacement().items() if name == "b"}
    torch.testing.assert_close(kept.only({"b"}).quadratic(only), fisher.quadratic(zeros() | {"b": still["b"]}))


def zeros() -> Parameters:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


@both_kinds
def test_a_penalty_keeps_a_term_a_task(kind: Kind) -> None:
    given = [(random_kronecker(seed, kind), displacement(seed)) for seed in range(3)]
    penalty, live = Penalty(), {name: values.requires_grad_() for name, values in displacement().items()}
    for fisher, anchor in given:
        penalty = penalty.plus(fisher, anchor)
    slow = [fisher.quadratic({name: live[name] - at[name] for name in at}) for fisher, at in given]
    expected = torch.stack(slow).sum()
    assert len(penalty.terms) == 3
    torch.testing.assert_close(penalty(live), expected)
    found = torch.autograd.grad(penalty(live), list(live.values()))
    for one, other in zip(found, torch.autograd.grad(expected, list(live.values())), strict=True):
        torch.testing.assert_close(one, other)


@both_kinds
def test_a_penalty_comes_back_to_the_last_bit_from_a_file_that_may_hold_no_code(kind: Kind) -> None:
    fisher = random_kronecker(0, kind).only_rows({"w": torch.tensor([True, False, True])})
    penalty, file = Penalty().plus(fisher, displacement(1)), io.BytesIO()
    torch.save(penalty, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert torch.equal(read(displacement()), penalty(displacement()))
    for name, values in penalty.terms[0].curvature.product(displacement()).items():
        assert torch.equal(read.terms[0].curvature.product(displacement())[name], values)
