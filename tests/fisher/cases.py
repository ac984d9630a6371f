"""Small models, one per kind of layer, and examples for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cl_runner.fisher.curvature import Diagonal
from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from cl_runner.streams.base import Examples, Scenario, Stream, Task

CHANNELS, SIDE, FEATURES = 4, 4, 6
PIXELS = CHANNELS * SIDE * SIDE
CLASSES = (0, 1), (2, 3, 4)  # of each task; class 5 never comes
OUTPUTS = 6


class Attention(nn.Module):
    """Pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)
        self.project = nn.Linear(CHANNELS, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.flatten(2).transpose(1, 2)
        return self.project((tokens + self.attend(tokens, tokens, tokens)[0]).mean(1))


class Twice(nn.Module):
    """One layer called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.repeated = nn.Linear(PIXELS, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.repeated(self.repeated(self.enter(inputs.flatten(1)).tanh()).tanh())


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(PIXELS, FEATURES)
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(self.enter(inputs.flatten(1)).tanh()).tanh())


class LookedUpOnce(nn.Module):
    """A table of biases that is indexed once and cached while in eval mode, as in timm's TinyViT."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention_biases = nn.Linear(PIXELS, FEATURES), nn.Parameter(torch.rand(FEATURES))
        self.attention_bias_cache: dict[str, Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        biases = self.attention_biases[torch.arange(FEATURES).flip(0)]
        if not self.training:
            biases = self.attention_bias_cache.setdefault("", biases)
        return (self.enter(inputs.flatten(1)) + biases).tanh()


class Bare(nn.Module):
    """A parameter that belongs to no layer, and one that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.rand(FEATURES)), nn.Parameter(torch.rand(3))
        self.enter = nn.Linear(PIXELS, FEATURES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.enter(inputs.flatten(1)).tanh()


def convolutions(**settings: int | bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3, padding=1, **settings),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, FEATURES, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, FEATURES))


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, FEATURES, 1), nn.MaxPool2d(2), nn.Flatten()
    )


def registered_twice() -> nn.Module:
    shared = nn.Linear(FEATURES, FEATURES)
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.Tanh(), shared, nn.Tanh(), shared)


def partly_frozen() -> nn.Module:
    layers = mlp()
    layers[1].requires_grad_(False)
    layers[4].bias.requires_grad_(False)
    return layers


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES)),
    "mlp": mlp,
    "bias-free": lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES, bias=False)),
    "conv": convolutions,
    "conv without bias": lambda: convolutions(bias=False),
    "depthwise": lambda: convolutions(groups=CHANNELS),
    "groups": lambda: convolutions(groups=2),
    "batch norm": batch_norm,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(SIDE), nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.GELU()),
    "attention": Attention,
    "called twice": Twice,
    "tied": Tied,
    "registered twice": registered_twice,
    "bare parameters": Bare,
    "frozen": partly_frozen,
}
UNCOVERED: dict[str, Callable[[], nn.Module]] = {"looked up once": LookedUpOnce}  # by taps, so that they fall back


def stream(scenario: Scenario) -> Stream:
    def nothing(split: str) -> Examples:
        return examples(0)

    tasks = [Task(index, classes, nothing) for index, classes in enumerate(CLASSES)]
    return Stream(scenario, tasks, OUTPUTS, (CHANNELS, SIDE, SIDE), None, None)


def model(
    backbone: str | nn.Module = "mlp", scenario: Scenario = Scenario.TASK, pretrained_head: nn.Linear | None = None
) -> Model:
    """A float64 model with every task revealed, in train mode augmented, so that nothing relies on eval mode."""
    torch.manual_seed(0)
    layers = (BACKBONES | UNCOVERED)[backbone]() if isinstance(backbone, str) else backbone
    preprocess = Preprocess(CHANNELS, mean=[0.5] * CHANNELS, std=[0.25] * CHANNELS, augment=("crop", "flip"))
    built = Model(preprocess, layers, FEATURES, stream(scenario), pretrained_head=pretrained_head).double()
    for task in stream(scenario).tasks:
        built.reveal(task)
    with torch.no_grad():
        built.head.weight *= 4  # neither confident nor undecided
    return built.train()


def examples(count: int = 11, seed: int = 0) -> Examples:
    """Examples of both tasks, mixed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, CHANNELS, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    return Examples(images, labels, (labels > 1).long())


def distance(found: Diagonal, expected: Diagonal) -> float:
    """|found - expected| / |expected|, over all parameters together."""
    assert list(found.values) == list(expected.values)
    difference = sum((found.values[name] - values).square().sum() for name, values in expected.values.items())
    return float((difference / sum(values.square().sum() for values in expected.values.values())) ** 0.5)
