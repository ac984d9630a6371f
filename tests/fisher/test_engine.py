"""The sum over batches: what it refuses, what it holds at a time, and what it falls back on."""

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.fisher import engine, reference
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.engine import undisturbed
from cl_runner.fisher.estimators import Empirical, Estimator, Exact, Probe
from cl_runner.fisher.magnitudes import Magnitudes
from cl_runner.gradients import convolutions, layers, passes, trial
from cl_runner.gradients.fallbacks import add_looped, add_vmapped
from cl_runner.gradients.passes import add_tapped_squares
from cl_runner.gradients.taps import Taps
from cl_runner.gradients.trial import disagreement
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples

from .cases import BACKBONES, CHANNELS, FEATURES, PIXELS, SIDE, UNCOVERED, distance, examples, model
from .test_estimators import untouched


@pytest.fixture(autouse=True)
def nothing_said():
    trial._say_once.cache_clear()


class AlwaysTraining(nn.Module):
    """Keeps its layer in train mode, whatever mode is set."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def train(self, mode: bool = True) -> "AlwaysTraining":
        return super().train(True)


class Function(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(PIXELS, FEATURES), function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.layer(inputs.flatten(1)))


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), *layers)


def attention_with_dropout(x: Tensor) -> Tensor:
    x = x[:, None, :, None].expand(-1, 1, -1, FEATURES)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).mean((1, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm without statistics": (
        lambda: sequence(nn.BatchNorm1d(FEATURES, track_running_stats=False)),
        r"backbone\.2 \(BatchNorm1d\) normalises by the statistics of its batch",
    ),
    "batch norm in train mode": (
        lambda: sequence(AlwaysTraining(nn.BatchNorm1d(FEATURES))),
        r"backbone\.2\.layer \(BatchNorm1d\) normalises by the statistics of its batch",
    ),
    "dropout in train mode": (
        lambda: sequence(AlwaysTraining(nn.Dropout(0.5))),
        r"backbone\.2\.layer \(Dropout\) stays active in eval mode",
    ),
    "batch norm by its function": (
        lambda: Function(lambda x: F.batch_norm(x, None, None, training=True) if len(x) > 1 else x),
        "in which a batch norm uses the statistics of its batch even in eval mode",
    ),
    "dropout by its function": (lambda: Function(F.dropout), "in which a dropout stays active in eval mode"),
    "alpha dropout by its function": (
        lambda: Function(lambda x: F.alpha_dropout(x, training=True)),
        "in which a dropout stays active in eval mode",
    ),
    "dropout in attention": (lambda: Function(attention_with_dropout), "depends on .* or on chance"),
    "noise": (lambda: Function(lambda x: x * torch.rand_like(x)), "depends on .* or on chance"),
    "statistics of the batch": (lambda: Function(lambda x: x - x.mean(0) / 2), "depends on the other samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_samples_do_not_stand_for_themselves_is_refused_in_one_line(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        Probe()(model(build()), examples())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.BatchNorm1d(FEATURES), nn.InstanceNorm1d(FEATURES)])
def test_layers_that_leave_samples_to_themselves_in_eval_mode_are_not_refused(layer: nn.Module) -> None:
    trial.refuse_batch_dependence(model(sequence(layer)).eval())


@pytest.mark.parametrize("way", [add_vmapped, add_looped])
@pytest.mark.parametrize("name", [*BACKBONES, *UNCOVERED])
def test_what_the_taps_fall_back_on_is_the_definition_too(
    name: str, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, data = model(name), examples(5)
    monkeypatch.setattr(engine, "choose_way", lambda *_: way)
    with untouched(subject):
        found = Exact(batch_size=3)(subject, data)
    assert distance(found, reference.exact(subject, data)) < 1e-10


@pytest.mark.parametrize("way", [add_tapped_squares, add_vmapped, add_looped])
@pytest.mark.parametrize("name", ["conv", "groups", "depthwise", "batch norm"])
def test_channels_last_changes_nothing(name: str, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = model(name), examples(5)
    expected = reference.exact(subject, data)
    subject.preprocess.memory_format = torch.channels_last
    monkeypatch.setattr(engine, "choose_way", lambda *_: way)
    assert distance(Exact()(subject.to(memory_format=torch.channels_last), data), expected) < 1e-10


@pytest.mark.parametrize("name", BACKBONES)
def test_every_kind_of_layer_is_covered_by_taps(name: str) -> None:
    subject = model(name)
    with undisturbed(subject):
        assert disagreement(subject, subject.preprocess(examples(2).images)) is None


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm", "attention"])
def test_float32_is_right_to_the_sixth_digit_over_many_batches(name: str) -> None:
    data, estimator = examples(4 * engine.FOLD + 3), Empirical(batch_size=2)
    assert distance(estimator(model(name).float(), data), estimator(model(name), data)) < 1e-6


def test_a_sum_of_very_many_batches_is_right_to_the_sixth_digit() -> None:
    sums, plain = engine.Sums({"weight": torch.zeros(())}), torch.zeros(())
    for _ in range(20_000):
        sums.partial["weight"] += 0.1
        plain += 0.1
        sums.close_batch()
    assert float(sums.over(20_000)["weight"]) == pytest.approx(0.1, rel=1e-6)
    assert float(plain / 20_000) != pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("numbers", [1, 60])
@pytest.mark.parametrize("estimator", [Exact(), Probe(draws=2), Empirical()], ids=["exact", "probe", "empirical"])
def test_few_vectors_at_a_time_change_nothing(
    estimator: Estimator, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, data = model("conv"), examples()
    expected = estimator(subject, data)
    monkeypatch.setattr(engine, "OUTPUT_NUMBERS", numbers)
    assert distance(estimator(subject, data), expected) < 1e-12


@pytest.mark.parametrize("name", ["called twice", "tied"])
def test_few_gradients_of_shared_parameters_at_a_time_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, data, sizes = model(name), examples(), []
    expected = Exact()(subject, data)
    subject.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(passes, "SHARED", 2 * FEATURES * (FEATURES + 1))  # two samples of the repeated layer
    assert distance(Exact()(subject, data), expected) < 1e-12
    assert sizes.count(11) == 1, "the whole batch goes through once, to see that it is too much"
    assert sizes[-1] <= 3


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_one_sample_is_a_batch(count: int) -> None:
    subject, data = model("batch norm"), examples(count)
    assert distance(Exact(batch_size=4)(subject, data), reference.exact(subject, data)) < 1e-10


class SmallBranch(nn.Module):
    """A residual branch behind a layer scale that has not grown yet."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(PIXELS, FEATURES), nn.LayerNorm(FEATURES)
        self.scale = nn.Parameter(torch.full((FEATURES,), 1e-6))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.enter(inputs.flatten(1))
        return x + self.norm(x) * self.scale


@pytest.mark.parametrize(
    ("kind", "backbone", "parameter"),
    [
        (layers.Linear, lambda: sequence(nn.Tanh()), "backbone.1.weight"),
        (convolutions.Convolution, BACKBONES["conv"], "backbone.0.weight"),
        (layers.Affine, SmallBranch, "backbone.norm.weight"),
        (layers.Direct, SmallBranch, "backbone.scale"),
    ],
    ids=["linear", "convolution", "layer norm", "direct"],
)
def test_a_rule_that_is_wrong_is_found_out_and_not_used(
    kind: type[layers.Use],
    backbone: Callable[[], nn.Module],
    parameter: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    subject, data, right = model(backbone()), examples(), kind.add_squares

    def wrong(self: layers.Use, gradient: Tensor, totals: dict[str, Tensor]) -> None:
        right(self, gradient * 1.01, totals)

    monkeypatch.setattr(kind, "add_squares", wrong)
    assert distance(Probe()(subject, data), of_definition(subject, data)) < 1e-10
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.endswith(f"by vmap, which is slower: {parameter} is used in a way that no rule covers")


def of_definition(subject: Model, data: Examples) -> Diagonal:
    """What `Probe()` estimates."""
    signs = Probe().noise(len(data), len(subject.revealed), torch.Generator().manual_seed(Probe().seed_for(data)))
    return reference.probe(subject, data, signs)


def test_what_a_batch_needed_is_freed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []

    def taps(*args: Any) -> Taps:
        built = Taps(*args)
        made.extend(weakref.ref(thing) for thing in [built, *built.uses])
        return built

    monkeypatch.setattr(passes, "Taps", taps)
    gc.disable()  # on a device, what is left to the collector stays until memory runs out
    try:
        Probe()(model("conv"), examples())
        assert len(made) > 6
        assert not any(thing() for thing in made)
    finally:
        gc.enable()


class Undecided(nn.Module):
    """A linear layer that, on a batch with a bright image, is computed in a way that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, PIXELS) / PIXELS**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(1)
        if rows.max() > 1.9:  # of 2
            return torch.einsum("bi,oi->bo", rows, self.weight)
        return F.linear(rows, self.weight)


def darkened(bright: int) -> Examples:
    """Twelve examples, one of which is bright."""
    data = examples(12)
    data.images.clamp_(max=200)
    data.images[bright] = 255
    return data


@pytest.mark.parametrize("bright", [6, 7])  # within a batch, and at its end, where two images of it are tried
def test_a_model_that_leaves_the_rules_in_a_later_batch_is_computed_in_another_way_from_there_on(bright: int) -> None:
    subject, data = model(Undecided()), darkened(bright)
    with untouched(subject):
        found = Exact(batch_size=4)(subject, data)
    assert distance(found, reference.exact(subject, data)) < 1e-10


@pytest.mark.parametrize("bright", [6, 7])
def test_magnitudes_of_a_model_that_leaves_the_rules_in_a_later_batch_do_not_depend_on_the_batches(bright: int) -> None:
    subject, data = model(Undecided()), darkened(bright)
    found, alone = (Magnitudes(batch_size=size)(subject, data) for size in (4, 1))
    assert isinstance(found, Diagonal)
    assert isinstance(alone, Diagonal)
    assert distance(found, alone) < 1e-10


def test_magnitudes_that_the_taps_do_not_cover_are_said_to_be_slow(caplog: pytest.LogCaptureFixture) -> None:
    Magnitudes()(model("looked up once"), examples())
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith("per-sample gradients of this model are computed by vmap, which is slower")


def test_a_task_that_magnitudes_cannot_see_is_named_after_the_strategy() -> None:
    subject = model()
    subject.visible[1] = False
    with pytest.raises(ValueError, match="^strategy=mas: no output is active for task 1"):
        Magnitudes()(subject, examples())


def test_kronecker_refuses_a_model_that_leaves_the_rules_in_a_later_batch() -> None:
    with pytest.raises(ConfigError, match=r"fisher\.representation: expected diagonal or full for this model, since"):
        Probe(batch_size=4, representation="ekfac")(model(Undecided()), darkened(6))


class Overflowing(nn.Module):
    """A linear layer that returns NaN for a bright image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(PIXELS, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(1)
        return self.layer(rows.masked_fill(rows > 1.9, torch.nan))


@pytest.mark.parametrize("representation", ["diagonal", "ekfac", "full"])
def test_a_fisher_that_is_not_finite_is_named(representation: Any) -> None:
    estimator = Probe(batch_size=4, representation=representation)
    with pytest.raises(ValueError, match=r"the estimate for [a-z.]+ is not finite: the model has diverged"):
        estimator.estimate(model(Overflowing()), darkened(6))


def test_a_model_that_has_diverged_is_said_so() -> None:
    subject = model("mlp")
    with torch.no_grad():
        subject.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got non-finite ones for backbone\.1\.weight: the model has diverged"):
        Probe()(subject, examples())


def test_training_in_tf32_leaves_the_fisher_in_full_precision() -> None:
    seen = []

    def look(features: Tensor) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return features

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        Probe()(model(Function(look)), examples())
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", False)}


@pytest.mark.parametrize("name", REFUSED)
def test_the_check_before_training_refuses_what_a_pass_would(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refusal:
        Probe().check(model(build()), (CHANNELS, SIDE, SIDE))
    assert ("; only fisher=batched" in str(refusal.value)) == name.startswith("batch norm")


@pytest.mark.parametrize("name", REFUSED)
def test_magnitudes_refuse_it_without_a_word_of_a_fisher(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"^strategy: expected a model .*{message}") as refusal:
        Magnitudes().check(model(build()), (CHANNELS, SIDE, SIDE))
    assert "fisher" not in str(refusal.value).lower()


@pytest.mark.parametrize("representation", ["diagonal", "ekfac", "full"])
def test_the_check_leaves_a_good_model_alone(representation: Any) -> None:
    subject = model("conv")
    subject.visible.zero_()  # as before the first task
    with untouched(subject):
        Probe(representation=representation).check(subject, (CHANNELS, SIDE, SIDE))


def test_a_model_that_kronecker_has_no_factors_for_is_refused_before_training() -> None:
    subject = model(Undecided())
    with pytest.raises(ConfigError, match=r"fisher\.representation: expected diagonal or full for this model, since"):
        Probe(representation="ekfac").check(subject, (CHANNELS, SIDE, SIDE))


class Standardised(nn.Module):
    """A convolution whose weight is standardised by a batch norm, as timm's are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(FEATURES, CHANNELS, SIDE, SIDE), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, FEATURES, -1), None, None, training=True)
        return F.conv2d(inputs, weight.reshape_as(self.weight)).flatten(1)


def test_a_standardised_weight_that_is_frozen_is_no_batch_of_one_sample() -> None:
    subject, data = model(Standardised()), examples(5)
    assert distance(Exact(batch_size=4)(subject, data), reference.exact(subject, data)) < 1e-10
