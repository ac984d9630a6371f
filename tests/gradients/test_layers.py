"""Every layer's rules against autograd, one sample at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_runner.gradients import convolutions, products
from cl_runner.gradients.convolutions import Convolution, Depthwise, Pointwise
from cl_runner.gradients.layers import Affine, Direct, Embedding, Linear, Uncovered, Use
from cl_runner.gradients.taps import Taps
from cl_runner.models.model import Output, Parameters

SAMPLES = 3


class Scaled(nn.Module):
    """A parameter that is used directly."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.values


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


def batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    nn.init.uniform_(layer.running_mean, -1, 1)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


Case = tuple[type[Use], Callable[[], nn.Module], tuple[int, ...]]

LINEAR: dict[str, Case] = {
    "linear": (Linear, lambda: nn.Linear(5, 4), (5,)),
    "linear, bias-free": (Linear, lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear, bias only": (Linear, lambda: frozen(nn.Linear(5, 4), "weight"), (5,)),
    "linear, weight only": (Linear, lambda: frozen(nn.Linear(5, 4), "bias"), (7, 5)),
    "linear, one token": (Linear, lambda: nn.Linear(5, 4), (1, 5)),
    "linear, few tokens": (Linear, lambda: nn.Linear(5, 4), (3, 5)),
    "linear, tokens": (Linear, lambda: nn.Linear(5, 4), (20, 5)),
    "linear, many tokens": (Linear, lambda: nn.Linear(5, 4), (130, 5)),
    "linear, tokens, bias only": (Linear, lambda: frozen(nn.Linear(5, 4), "weight"), (9, 5)),
    "linear, several token axes": (Linear, lambda: nn.Linear(5, 4), (2, 3, 4, 5)),
}
CONVOLUTIONS: dict[str, Case] = {
    "conv": (Convolution, lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "conv, one position": (Convolution, lambda: nn.Conv2d(4, 6, 3), (4, 3, 3)),
    "conv, many positions": (Convolution, lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 12, 12)),
    "conv, bias-free": (Convolution, lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 6, 5)),
    "conv, bias only": (Convolution, lambda: frozen(nn.Conv2d(4, 6, 3), "weight"), (4, 6, 5)),
    "conv, stride": (Convolution, lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 8, 7)),
    "conv, stride past the end": (Convolution, lambda: nn.Conv2d(4, 6, 2, stride=3), (4, 7, 9)),
    "conv, padding": (Convolution, lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)), (4, 5, 4)),
    "conv, same": (Convolution, lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (4, 6, 6)),
    "conv, valid": (Convolution, lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 6, 5)),
    "conv, circular": (Convolution, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 4)),
    "conv, dilation": (Convolution, lambda: nn.Conv2d(4, 6, 3, dilation=2), (4, 7, 8)),
    "conv, all at once": (
        Convolution,
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3), groups=2),
        (4, 9, 8),
    ),
    "conv, groups": (Convolution, lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 5)),
    "conv, groups, many positions": (Convolution, lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 14, 15)),
    "conv, groups of a channel": (Convolution, lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 5)),
    "conv, 1d": (Convolution, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "conv, 3d": (Convolution, lambda: nn.Conv3d(2, 3, (2, 3, 1), padding=1), (2, 3, 4, 3)),
    "conv, 1d, groups": (Convolution, lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 11)),
    "depthwise": (Depthwise, lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 5)),
    "depthwise, bias-free": (Depthwise, lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 6, 5)),
    "depthwise, bias only": (Depthwise, lambda: frozen(nn.Conv2d(4, 4, 3, groups=4), "weight"), (4, 6, 5)),
    "depthwise, one channel": (Depthwise, lambda: nn.Conv2d(1, 1, 3), (1, 6, 5)),
    "depthwise, stride": (Depthwise, lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (4, 7, 8)),
    "depthwise, large": (Depthwise, lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4), (4, 6, 5)),
    "depthwise, dilation": (Depthwise, lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=4), (4, 7, 8)),
    "depthwise, uneven": (
        Depthwise,
        lambda: nn.Conv2d(4, 4, (5, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2), groups=4),
        (4, 9, 8),
    ),
    "depthwise, many positions": (Depthwise, lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (4, 32, 33)),
    "pointwise": (Pointwise, lambda: nn.Conv2d(4, 6, 1), (4, 6, 5)),
    "pointwise, one position": (Pointwise, lambda: nn.Conv2d(4, 6, 1), (4, 1, 1)),
    "pointwise, many positions": (Pointwise, lambda: nn.Conv2d(4, 6, 1), (4, 12, 12)),
    "pointwise, stride": (Pointwise, lambda: nn.Conv2d(4, 6, 1, stride=(2, 3), bias=False), (4, 7, 8)),
    "pointwise, padding": (Convolution, lambda: nn.Conv2d(4, 6, 1, padding=1), (4, 3, 4)),
    "pointwise, 1d": (Pointwise, lambda: nn.Conv1d(4, 6, 1, stride=2), (4, 7)),
}
OTHERS: dict[str, Case] = {
    "batch norm, 1d": (Affine, lambda: batch_norm(nn.BatchNorm1d(4)), (4,)),
    "batch norm, 1d, positions": (Affine, lambda: batch_norm(nn.BatchNorm1d(4)), (4, 5)),
    "batch norm, 2d": (Affine, lambda: batch_norm(nn.BatchNorm2d(4)), (4, 5, 3)),
    "batch norm, weight only": (Affine, lambda: frozen(batch_norm(nn.BatchNorm2d(4)), "bias"), (4, 5, 3)),
    "layer norm": (Affine, lambda: nn.LayerNorm(5), (5,)),
    "layer norm, tokens": (Affine, lambda: nn.LayerNorm(5), (7, 5)),
    "layer norm, two axes": (Affine, lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer norm, bias only": (Affine, lambda: frozen(nn.LayerNorm(5), "weight"), (7, 5)),
    "group norm": (Affine, lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "rms norm": (Affine, lambda: nn.RMSNorm(5), (7, 5)),
    "direct": (Direct, lambda: Scaled(5), (7, 5)),
    "direct, a number": (Direct, lambda: Scaled(), (5,)),
    "direct, whole": (Direct, lambda: Scaled(1, 7, 5), (7, 5)),
}
CASES = LINEAR | CONVOLUTIONS | OTHERS
TWO_AXES = [name for name, (_, _, shape) in CONVOLUTIONS.items() if len(shape) == 3]


class Encoded(nn.Module):
    """A layer whose outputs are logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def encode(self, inputs: Tensor) -> Output:
        return Output(self.layer(inputs), inputs, inputs)


def trial(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = case[1]().double().eval()
    for values in layer.parameters():
        values.data.uniform_(-1, 1)
    return Encoded(layer), torch.randn(SAMPLES, *case[2], dtype=torch.float64)


def autograd(model: nn.Module, inputs: Tensor, vectors: Tensor) -> Parameters:
    """Per-sample gradients [B, ...] by parameter."""
    parameters = {name: values for name, values in model.named_parameters() if values.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for sample, vector in zip(inputs.split(1), vectors.split(1), strict=True):
        logits = model.encode(sample).logits
        for name, gradient in zip(
            parameters, torch.autograd.grad(logits, list(parameters.values()), vector), strict=True
        ):
            found[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def handed(taps: Taps, passes: list[Tensor]) -> Iterator[tuple[Use, Tensor]]:
    """The gradients that arrive at the taps in every pass."""
    for use in taps.uses:
        use.passes = len(passes)
    for index, vectors in enumerate(passes):
        arrived: list[tuple[Use, Tensor]] = []
        taps.backward(vectors, lambda use, gradient, to=arrived: to.append((use, gradient)), index == len(passes) - 1)
        yield from arrived


def check_squares(model: nn.Module, inputs: Tensor, passes: list[Tensor]) -> None:
    """Assert that `add_squares` and `close` add autograd's gradients, squared and summed."""
    taps = Taps(model, inputs)
    expected: Parameters = {}
    for vectors in passes:
        for name, values in autograd(model, inputs, vectors).items():
            expected[name] = expected.get(name, 0) + values.square().sum(0)
    totals = {name: torch.ones(values.shape, dtype=values.dtype) for name, values in expected.items()}
    for use, gradient in handed(taps, passes):
        use.add_squares(gradient, totals)
    for use in taps.uses:
        use.close(totals)
    for name, values in expected.items():
        torch.testing.assert_close(totals[name], 1 + values, rtol=1e-11, atol=1e-11)


def outputs(model: nn.Module, inputs: Tensor, passes: int) -> list[Tensor]:
    logits = model.encode(inputs).logits.detach()
    return [torch.randn_like(logits) for _ in range(passes)]


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_every_sample_is_autograds(name: str) -> None:
    model, inputs = trial(CASES[name])
    (vectors,) = outputs(model, inputs, 1)
    taps = Taps(model, inputs)
    ((use, gradient),) = handed(taps, [vectors])
    assert type(use) is CASES[name][0]
    found, expected = use.per_sample(gradient), autograd(model, inputs, vectors)
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        torch.testing.assert_close(found[parameter].view_as(values), values, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("passes", [1, 20])
@pytest.mark.parametrize("name", CASES)
def test_the_squares_are_those_of_autograd(name: str, passes: int) -> None:
    model, inputs = trial(CASES[name])
    check_squares(model, inputs, outputs(model, inputs, passes))


@pytest.mark.parametrize("passes", [1, 20])
@pytest.mark.parametrize("name", TWO_AXES)
def test_the_squares_are_the_same_in_channels_last(name: str, passes: int) -> None:
    model, inputs = trial(CONVOLUTIONS[name])
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    vectors = [values.to(memory_format=torch.channels_last) for values in outputs(model, inputs, passes)]
    check_squares(model, inputs, vectors)


@pytest.mark.parametrize("name", TWO_AXES)
def test_the_squares_are_right_for_a_gradient_that_is_one_number_at_all_positions(name: str) -> None:
    model, inputs = trial(CONVOLUTIONS[name])
    (vectors,) = outputs(model, inputs, 1)
    check_squares(model, inputs, [vectors[:, :, :1, :1].expand_as(vectors)])  # as behind a mean over positions


@pytest.mark.parametrize("name", [*LINEAR, *TWO_AXES])
def test_the_squares_are_the_same_when_the_cache_holds_less_than_a_sample(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CACHE", 7)
    model, inputs = trial(CASES[name])
    check_squares(model, inputs, outputs(model, inputs, 20))


@pytest.mark.parametrize(("tokens", "passes", "held"), [(20, 20, True), (20, 1, False), (65, 1000, False)])
def test_pairs_of_tokens_are_summed_over_passes_where_that_is_cheaper(tokens: int, passes: int, held: bool) -> None:
    use = Linear({"weight": "weight"}, torch.randn(SAMPLES, tokens, 5))
    use.passes = passes
    use.add_squares(torch.randn(SAMPLES, tokens, 4), {"weight": torch.zeros(4, 5)})
    assert (use.held is not None) == held


@pytest.mark.parametrize("case", ["linear", "pointwise", "conv"])
def test_squares_are_never_negative_however_much_of_a_sum_cancels(case: str) -> None:
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(8, 8), (16, 8)),
        "pointwise": (nn.Conv2d(8, 8, 1), (8, 4, 4)),
        "conv": (nn.Conv2d(8, 8, 3), (8, 6, 6)),
    }[case]
    model, inputs = Encoded(layer), torch.ones(SAMPLES, *shape)
    positions = 1 if case == "linear" else (2, 3)
    passes = [values - values.mean(positions, keepdim=True) for values in outputs(model, inputs, 20)]
    taps = Taps(model, inputs)
    totals = {name: torch.zeros_like(values.detach()) for name, values in model.named_parameters()}
    for use, gradient in handed(taps, passes):
        use.add_squares(gradient, totals)
    for use in taps.uses:
        use.close(totals)
    assert all((values >= 0).all() for values in totals.values())
    assert all(float(values.max()) < 1e-3 for values in totals.values()), "the sum over positions is zero"


@pytest.mark.parametrize("padding", [None, 1, -2])
@pytest.mark.parametrize("shape", [(), (7,), (2, 4)])
def test_the_squares_of_an_embedding_are_those_of_autograd(shape: tuple[int, ...], padding: int | None) -> None:
    torch.manual_seed(0)
    model = Encoded(nn.Embedding(5, 3, padding_idx=padding).double())
    inputs = torch.randint(4, (SAMPLES, *shape))  # the last row is never looked up, others several times
    assert isinstance(Taps(model, inputs).uses[0], Embedding)
    check_squares(model, inputs, outputs(model, inputs, 2))


def test_an_embedding_that_is_used_twice_is_not_covered() -> None:
    use = Embedding({"weight": "table"}, torch.zeros(2, 3, dtype=torch.int64), None)
    with pytest.raises(Uncovered, match="gradients of the table table would be too large"):
        use.per_sample(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", ["linear, tokens", "conv", "pointwise", "depthwise"])
def test_a_weight_may_be_stored_in_another_shape_than_it_is_used_in(name: str) -> None:
    class Reshaped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.stored = layer, nn.Parameter(layer.weight.detach().reshape(2, -1))

        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.stored.view_as(self.layer.weight)
            return torch.func.functional_call(self.layer, {"weight": weight}, (inputs,))

    kind, build, shape = CASES[name]
    model, inputs = trial((kind, lambda: Reshaped(frozen(build(), "weight")), shape))
    for passes in (1, 20):
        check_squares(model, inputs, outputs(model, inputs, passes))


def test_a_convolution_that_pads_one_side_more_is_not_covered() -> None:
    model, inputs = trial((Convolution, lambda: nn.Conv2d(4, 6, 2, padding="same"), (4, 5, 5)))
    with pytest.raises(Uncovered, match="pads one side more than the other"):
        Taps(model, inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, (2, 1), (2, 1))])
def test_a_large_kernel_is_taken_apart_by_rows_which_changes_nothing(
    stride: int, padding: Any, dilation: Any, layout: torch.memory_format
) -> None:
    weight = torch.randn(256, 256, 3, 3, dtype=torch.float64)
    assert weight[:, :, 0].numel() <= convolutions.PART < weight.numel()
    inputs = torch.randn(3, 256, 9, 9, dtype=torch.float64).contiguous(memory_format=layout)
    use = convolutions.Convolution(
        {"weight": "w"}, inputs, convolutions.strided(weight, 2, stride, padding, dilation, 1)
    )
    gradient = torch.randn_like(torch.conv2d(inputs, weight, None, stride, padding, dilation))
    stored = torch.zeros(256, 256 * 9, dtype=torch.float64)  # its shape may differ from the one it is used in
    use.add_squares(gradient, {"w": stored})
    found = stored.view_as(weight)
    expected = use.per_sample(gradient)["w"].square().sum(0)
    assert float((found - expected).norm() / expected.norm()) < 1e-14
