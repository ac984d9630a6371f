"""Whole models through the taps, and through what they fall back on, against the definition."""

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from cl_runner.fisher import reference
from cl_runner.fisher.estimators import Probe
from cl_runner.gradients import trial
from cl_runner.models.model import Model
from tests.fisher.cases import CHANNELS, FEATURES, OUTPUTS, PIXELS, SIDE, distance, examples, model

TOKENS = SIDE * SIDE
PARTS = {
    "flat": lambda: nn.Linear(PIXELS, FEATURES),
    "project": lambda: nn.Linear(CHANNELS, FEATURES),
    "square": lambda: nn.Linear(FEATURES, FEATURES),
    "other": lambda: nn.Linear(FEATURES, FEATURES),
    "mix": lambda: nn.Linear(CHANNELS, CHANNELS),
    "conv": lambda: nn.Conv2d(CHANNELS, FEATURES, 3),
    "keep": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "attend": lambda: nn.MultiheadAttention(CHANNELS, 2, batch_first=True),
}
Forward = Callable[..., Tensor]


class Net(nn.Module):
    """A backbone made of a function and its arguments by name: layers, from `PARTS` or given, or parameters."""

    def __init__(self, function: Forward, *names: str, **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.names = function, [*names, *parts]
        for name in names:
            setattr(self, name, PARTS[name]())
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.rand(part) + 0.2) if isinstance(part, tuple) else part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, *(getattr(self, name) for name in self.names))


def tokens(images: Tensor) -> Tensor:
    """Pixels as tokens, [B, T, C]."""
    return images.flatten(2).transpose(1, 2)


def hidden(images: Tensor, flat: nn.Module) -> Tensor:
    return flat(images.flatten(1)).tanh()


def twice_in_a_convolution(x: Tensor, keep: nn.Module, project: nn.Module) -> Tensor:
    return project(keep(keep(x).tanh()).tanh().mean((2, 3)))


def in_place(x: Tensor, keep: nn.Module, norm: nn.Module, project: nn.Module) -> Tensor:
    identity = x
    out = norm(keep(x))
    out = F.relu(out, inplace=True)
    out = keep(out)
    out += identity
    return project(out.relu_().mean((2, 3)))


def class_token(x: Tensor, mix: nn.Module, project: nn.Module, token: Tensor, position: Tensor) -> Tensor:
    x = torch.cat([token.expand(x.shape[0], -1, -1), mix(tokens(x))], dim=1)
    return project((x + position).tanh())[:, 0]


def timm_attention(x: Tensor, qkv: nn.Module, project: nn.Module) -> Tensor:
    x = tokens(x)
    q, k, v = qkv(x).reshape(len(x), TOKENS, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), TOKENS, CHANNELS)
    return project(x).mean(1)


def separate_keys(x: Tensor, query: nn.Module, key: nn.Module, project: nn.Module) -> Tensor:
    """The gradient of the key's bias is nothing but rounding."""
    x = tokens(x)
    weights = (query(x) @ key(x).transpose(1, 2)).softmax(-1)
    return project(weights @ x).mean(1)


def viewed(x: Tensor, attend: nn.Module, project: nn.Module) -> Tensor:
    x = tokens(x).transpose(0, 1)
    return project(attend(x, x, x)[0].view(TOKENS, -1).mean(0).view(-1, CHANNELS))


def weights_used(x: Tensor, attend: nn.Module, project: nn.Module) -> Tensor:
    x = tokens(x)
    out, weights = attend(x, x, x, average_attn_weights=False)
    return project((weights.sum(1) @ out).mean(1))


def causal(x: Tensor, attend: nn.Module, project: nn.Module) -> Tensor:
    x = tokens(x)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return project(attend(x, x, x, attn_mask=mask)[0].mean(1))


def narrow_keys(x: Tensor, attend: nn.Module, narrow: nn.Module, project: nn.Module) -> Tensor:
    x, keys = tokens(x), narrow(tokens(x))
    return project(attend(x, keys, keys, need_weights=False)[0].mean(1))


def standardised(x: Tensor, conv: nn.Conv2d) -> Tensor:
    weight = conv.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight, conv.bias).mean((2, 3))


def one_by_one(x: Tensor, flat: nn.Module, rows: Tensor) -> Tensor:
    x = hidden(x, flat)
    for row in rows:
        x = x * row
    return x


def without_gradient(x: Tensor, flat: nn.Module, square: nn.Module) -> Tensor:
    with torch.no_grad():
        x = hidden(x, flat)
    return square(x)


def overwritten(x: Tensor, flat: nn.Module) -> Tensor:
    x = x.flatten(1).clone()
    y = flat(x)
    x.zero_()
    return y.tanh()


def bias_only() -> nn.Module:
    layer = PARTS["flat"]()
    layer.weight.requires_grad_(False)  # otherwise autograd itself would need what is overwritten
    return layer


class OwnLinear(torch.autograd.Function):
    """As written before `torch.func` existed."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ inputs


class OwnSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def tied_twice() -> nn.Module:
    """One weight in two layers, one of which is called twice."""
    net = Net(
        lambda x, flat, square, other: other(square(square(hidden(x, flat)).tanh()).tanh()), "flat", "square", "other"
    )
    net.other.weight = net.square.weight
    return net


def partly_frozen() -> nn.Module:
    net = Net(
        lambda x, keep, norm, conv: conv(norm(keep(x))).tanh().mean((2, 3)),
        "keep",
        norm=batch_norm(),
        conv=PARTS["conv"](),
    )
    net.keep.requires_grad_(False)
    net.norm.bias.requires_grad_(False)
    net.conv.weight.requires_grad_(False)
    return net


def batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`")
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.Tanh()))


def recurrent() -> nn.Module:
    return Net(lambda x, rnn: rnn(tokens(x))[0][:, -1], rnn=nn.LSTM(CHANNELS, FEATURES, batch_first=True))


def sequence_first_attention() -> nn.Module:
    return Net(viewed, attend=nn.MultiheadAttention(CHANNELS, 2), project=PARTS["project"]())


def embedded(**settings: int | None) -> nn.Module:
    table = nn.Embedding(5, FEATURES, **settings)
    return Net(lambda x, table: table((x.flatten(1) > 0).long()).tanh().mean(1), table=table)


COVERED: dict[str, Callable[[], nn.Module]] = {
    "a layer called twice": lambda: Net(
        lambda x, flat, square: square(square(hidden(x, flat)).tanh()), "flat", "square"
    ),
    "a convolution called twice": lambda: Net(twice_in_a_convolution, "keep", "project"),
    "a tied weight": tied_twice,
    "a bias also used by itself": lambda: Net(
        lambda x, flat, square: square(hidden(x, flat)).tanh() * square.bias, "flat", "square"
    ),
    "in-place arithmetic": lambda: Net(in_place, "keep", norm=batch_norm(), project=PARTS["project"]()),
    "a class token and positions": lambda: Net(
        class_token, "mix", "project", token=(1, 1, CHANNELS), position=(1, TOKENS + 1, CHANNELS)
    ),
    "layer scale of tokens": lambda: Net(
        lambda x, mix, project, scale: project((tokens(x) + mix(tokens(x)) * scale).mean(1)),
        "mix", "project", scale=(CHANNELS,),
    ),
    "layer scale in place": lambda: Net(
        lambda x, mix, project, scale: project(mix(tokens(x)).mul_(scale).mean(1)),
        "mix", "project", scale=(CHANNELS,),
    ),
    "layer scale, reshaped": lambda: Net(
        lambda x, keep, project, scale: project(keep(x).mul(scale.reshape(1, -1, 1, 1)).tanh().mean((2, 3))),
        "keep", "project", scale=(CHANNELS,),
    ),
    "layer scale of images": lambda: Net(
        lambda x, keep, project, scale: project((x + scale * keep(x)).tanh().mean((2, 3))),
        "keep", "project", scale=(CHANNELS, 1, 1),
    ),
    "one number": lambda: Net(lambda x, flat, scale: scale * hidden(x, flat), "flat", scale=()),
    "subtracted and divided": lambda: Net(
        lambda x, flat, a, b, c: c / (2 + (a - hidden(x, flat)).sub(b, alpha=2).square()) / a,
        "flat", a=(FEATURES,), b=(1, FEATURES), c=(FEATURES,),
    ),
    "added in place": lambda: Net(
        lambda x, flat, shift: flat(x.flatten(1)).__iadd__(shift).tanh(), "flat", shift=(1, FEATURES)
    ),
    "attention by hand": lambda: Net(timm_attention, qkv=nn.Linear(CHANNELS, 3 * CHANNELS), project=PARTS["project"]()),
    "a key's bias": lambda: Net(
        separate_keys,
        query=nn.Linear(CHANNELS, CHANNELS), key=nn.Linear(CHANNELS, CHANNELS), project=PARTS["project"](),
    ),
    "nn.MultiheadAttention": lambda: Net(
        lambda x, attend, project: project(attend(*[tokens(x)] * 3)[0].mean(1)), "attend", "project"
    ),
    "nn.MultiheadAttention without weights": lambda: Net(
        lambda x, attend, project: project(attend(*[tokens(x)] * 3, need_weights=False)[0].mean(1)), "attend", "project"
    ),
    "nn.MultiheadAttention, its weights used": lambda: Net(weights_used, "attend", "project"),
    "nn.MultiheadAttention, sequence first": sequence_first_attention,
    "nn.TransformerEncoderLayer": lambda: Net(
        lambda x, layer, project: project(layer(tokens(x)).mean(1)),
        layer=nn.TransformerEncoderLayer(CHANNELS, 2, 8, batch_first=True), project=PARTS["project"](),
    ),
    "a frozen part": partly_frozen,
    "a parameter never used": lambda: Net(lambda x, flat, unused: hidden(x, flat), "flat", unused=(3,)),
    "a parameter asked for its shape": lambda: Net(
        lambda x, flat, sizes: hidden(x, flat).view(-1, sizes.shape[0]).type_as(sizes), "flat", sizes=(FEATURES,)
    ),
    "no gradient": lambda: Net(without_gradient, "flat", "square"),
    "no gradient from here": lambda: Net(
        lambda x, flat, square: square(hidden(x, flat).detach()), "flat", "square"
    ),
    "a stored weight, viewed": lambda: Net(
        lambda x, weight: F.conv2d(x, weight.view(FEATURES, CHANNELS, 3, 3)).tanh().mean((2, 3)),
        weight=(2, 3, CHANNELS * 9),
    ),
    "an activation of one's own": lambda: Net(lambda x, flat: OwnSquare.apply(flat(x.flatten(1))), "flat"),
    "an embedding": embedded,
    "an embedding with padding": lambda: embedded(padding_idx=1),
    "an embedding with padding counted from the end": lambda: Net(
        lambda x, table: F.embedding((x.flatten(1) > 0).long() + 3, table, padding_idx=-1).tanh().mean(1),
        table=(5, FEATURES),
    ),
    "an embedding of one index": lambda: Net(
        lambda x, table: table((x.mean((1, 2, 3)) > 0).long()), table=nn.Embedding(5, FEATURES)
    ),
}  # fmt: skip

UNCOVERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "keys of another width": (
        lambda: Net(
            narrow_keys,
            attend=nn.MultiheadAttention(CHANNELS, 2, kdim=3, vdim=3, batch_first=True),
            narrow=nn.Linear(CHANNELS, 3), project=PARTS["project"](),
        ),
        "backbone.attend.in_proj_bias is used in an attention with use_separate_proj_weight",
    ),
    "biases of keys": (
        lambda: Net(
            lambda x, attend, project: project(attend(*[tokens(x)] * 3)[0].mean(1)),
            attend=nn.MultiheadAttention(CHANNELS, 2, batch_first=True, add_bias_kv=True), project=PARTS["project"](),
        ),
        "backbone.attend.in_proj_weight is used in an attention with bias_k, bias_v",
    ),
    "a mask": (
        lambda: Net(causal, "attend", "project"),
        "backbone.attend.in_proj_weight is used in an attention with attn_mask",
    ),
    "a scripted part": (
        lambda: Net(lambda x, part, square: square(part(x)), part=scripted(), square=PARTS["square"]()),
        "backbone.part.1.weight is used in a way that no rule covers",
    ),
    "sequence first": (
        lambda: Net(lambda x, project: project(tokens(x).transpose(0, 1)).tanh().mean(0), "project"),
        "backbone.project.weight is used on inputs without the samples as first axis",
    ),
    "two tokens first, where two images are compared": (
        lambda: Net(lambda x, project: project(tokens(x)[:, :2].transpose(0, 1)).tanh().mean(0), "project"),
        "backbone.project.weight is used in a way that no rule covers",
    ),
    "tokens and samples in one axis": (
        lambda: Net(
            lambda x, project: project(tokens(x).flatten(0, 1)).tanh().view(-1, TOKENS, FEATURES).mean(1), "project"
        ),
        "backbone.project.weight is used on inputs without the samples as first axis",
    ),
    "windows": (
        lambda: Net(
            lambda x, project: project(tokens(x).reshape(-1, 4, CHANNELS)).tanh().view(-1, TOKENS, FEATURES).mean(1),
            "project",
        ),
        "backbone.project.weight is used on inputs without the samples as first axis",
    ),
    "inputs changed in place afterwards": (
        lambda: Net(overwritten, flat=bias_only()),
        "the inputs of backbone.flat.bias are changed in place afterwards",
    ),
    "a matrix": (
        lambda: Net(lambda x, flat, matrix: hidden(x, flat) @ matrix, "flat", matrix=(FEATURES, FEATURES)),
        "backbone.matrix is used in matmul",
    ),
    "einsum": (
        lambda: Net(lambda x, flat, m: torch.einsum("bi,ij->bj", hidden(x, flat), m), "flat", m=(FEATURES, FEATURES)),
        "backbone.m is used in einsum",
    ),
    "a row": (
        lambda: Net(lambda x, flat, rows: hidden(x, flat) * rows[1], "flat", rows=(3, FEATURES)),
        "backbone.rows is used in getitem",
    ),
    "rows in a loop": (lambda: Net(one_by_one, "flat", rows=(3, FEATURES)), "backbone.rows is used in unbind"),
    "an operand by name": (
        lambda: Net(lambda x, flat, scale: torch.mul(hidden(x, flat), other=scale), "flat", scale=(FEATURES,)),
        "backbone.scale is used in a way that no rule covers",
    ),
    "an operand by name, of little weight": (
        lambda: Net(
            lambda x, flat, scale, shift: torch.add(hidden(x, flat) * scale, other=shift, alpha=1e-4),
            "flat", scale=(FEATURES,), shift=(FEATURES,),
        ),
        "backbone.shift is used in a way that no rule covers",
    ),
    "a standardised weight": (lambda: Net(standardised, "conv"), "backbone.conv.weight is used in mean"),
    "a weight used transposed elsewhere": (
        lambda: Net(lambda x, flat, square: square(hidden(x, flat)).tanh() @ square.weight, "flat", "square"),
        "backbone.square.weight is used in matmul",
    ),
    "weight norm": (
        lambda: Net(hidden, flat=weight_norm(PARTS["flat"]())),
        "backbone.flat.parametrizations.weight.original1 is used in weight_norm",
    ),
    "spectral norm": (
        lambda: Net(hidden, flat=spectral_norm(PARTS["flat"]())),
        "backbone.flat.parametrizations.weight.original is used in mv",
    ),
    "a table of queries": (
        lambda: Net(
            lambda x, flat, square, table: hidden(x, flat) * square(table).mean(0),
            "flat", "square", table=(2, FEATURES),
        ),
        "backbone.table is the input of linear",
    ),
    "positions from an embedding": (
        lambda: Net(
            lambda x, table, project: project((tokens(x) + table(torch.arange(TOKENS))).tanh().mean(1)),
            table=nn.Embedding(TOKENS, CHANNELS), project=PARTS["project"](),
        ),
        "backbone.table.weight is looked up in a way that no rule covers",
    ),
    "uneven padding": (
        lambda: Net(
            lambda x, conv: conv(x).tanh().mean((2, 3)), conv=nn.Conv2d(CHANNELS, FEATURES, (3, 2), padding="same")
        ),
        "backbone.conv.weight is used in a convolution that pads one side more than the other",
    ),
    "a transposed convolution": (
        lambda: Net(lambda x, conv: conv(x).tanh().mean((2, 3)), conv=nn.ConvTranspose2d(CHANNELS, FEATURES, 3)),
        "backbone.conv.weight is used in conv_transpose2d",
    ),
}  # fmt: skip

# `vmap` cannot compute these either, or computes them wrong.
HARD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a recurrent network": (recurrent, "backbone.rnn.weight_ih_l0 is used in lstm"),
    "a linear function of one's own": (
        lambda: Net(lambda x, flat: OwnLinear.apply(x.flatten(1), flat.weight).tanh() + flat.bias, "flat"),
        "backbone.flat.weight is used in t",
    ),
    "a recomputed part": (
        lambda: Net(lambda x, flat: checkpoint(hidden, x, flat, use_reentrant=False), "flat"),
        "CheckpointError",
    ),
    "a learned slope": (
        lambda: Net(lambda x, conv, slope: slope(conv(x)).mean((2, 3)), "conv", slope=nn.PReLU(FEATURES)),
        "backbone.slope.weight is used in prelu",
    ),
}


@pytest.fixture(autouse=True)
def nothing_said():
    trial._say_once.cache_clear()


def error(subject: Model) -> float:
    """How far `Probe` is from its definition, in batches of four and three; asserts that every parameter is close."""
    estimator, data = Probe(draws=2, batch_size=4), examples(7)
    signs = estimator.noise(len(data), OUTPUTS, torch.Generator().manual_seed(estimator.seed_for(data)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # from copying a scripted module
        found, expected = estimator(subject, data), reference.probe(subject, data, signs)
    scale = max(float(values.norm()) for values in expected.values.values())
    for name, values in expected.values.items():
        # A gradient that is zero in exact arithmetic is compared with the others.
        torch.testing.assert_close(
            found.values[name], values, rtol=1e-9, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    return distance(found, expected)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", COVERED)
def test_the_fisher_of_a_model_that_the_taps_cover_is_its_definition(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert error(model(COVERED[name]())) < 1e-10
    assert warned(caplog) == []


@pytest.mark.parametrize("name", UNCOVERED)
def test_a_model_that_the_taps_do_not_cover_is_left_to_vmap_with_a_reason(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, reason = UNCOVERED[name]
    assert error(model(build())) < 1e-10
    (said,) = warned(caplog)
    assert said == f"per-sample gradients of this model are computed by vmap, which is slower: {reason}"


@pytest.mark.parametrize("name", HARD)
def test_a_model_that_neither_covers_is_left_to_a_loop_with_both_reasons(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, reason = HARD[name]
    assert error(model(build())) < 1e-10
    (said,) = warned(caplog)
    assert said.startswith(
        f"per-sample gradients of this model are computed sample by sample, which is much slower: {reason}"
    )
    assert "; by vmap, " in said


def test_a_reason_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    subject = model(UNCOVERED["a matrix"][0]())
    for _ in range(2):
        Probe()(subject, examples())
    assert len(warned(caplog)) == 1


def test_a_compiled_backbone_has_the_fisher_of_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    subject, compiled = model("conv"), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Forward:
        compiled.append(graph)
        return graph.forward

    plain = Probe()(subject, examples())
    subject.backbone.compile(backend=backend)
    subject(examples().images)
    (graph,) = compiled
    assert distance(Probe()(subject, examples()), plain) == 0
    assert compiled == [graph]
    assert warned(caplog) == []
    torch.compiler.reset()


def test_a_model_that_trains_nothing_that_its_logits_depend_on_has_no_curvature() -> None:
    subject = model(Net(lambda x, flat, unused: hidden(x, flat), "flat", unused=(3,))).requires_grad_(False)
    subject.backbone.unused.requires_grad_(True)
    found = Probe()(subject, examples())
    assert list(found.values) == ["backbone.unused"]
    assert found.trace() == 0
