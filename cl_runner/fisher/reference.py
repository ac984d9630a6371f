"""The estimators' definitions as loops: one sample and one backward pass at a time, in float64. Slow on purpose.

Each is written from the textbook loss, through `log_softmax` over the active outputs, and shares no code with the fast
estimators, so that the two check each other. Randomised ones are given the draws. `logits` selects the active outputs
as in the estimators: "visible", "seen" or "all".
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Logits
from cl_runner.models.model import Classifier, Parameters, trainable
from cl_runner.models.substitute import nothing_kept
from cl_runner.streams.base import Examples


def exact(model: Classifier, examples: Examples, logits: Logits = "visible") -> Diagonal:
    """E_x Σ_c p_c (∂ log p_c / ∂θ)²."""
    total = _Total(model)
    for sample in _samples(total.model, examples, logits):
        for log_p in sample.log_p:
            total.add(log_p, weight=log_p.exp())
    return total.over(len(examples))


def sampled(model: Classifier, examples: Examples, clocks: Tensor, logits: Logits = "visible") -> Diagonal:
    """E_x mean over draws of (∂ log p_c / ∂θ)², c the class with the smallest `clocks` [N, draws, K] over p."""
    total = _Total(model)
    for sample, draws in zip(_samples(total.model, examples, logits), clocks, strict=True):
        for clock in draws:
            drawn = (clock[sample.entering] / sample.log_p.exp()).argmin()
            total.add(sample.log_p[drawn], weight=1 / len(draws))
    return total.over(len(examples))


def probe(model: Classifier, examples: Examples, signs: Tensor, logits: Logits = "visible") -> Diagonal:
    """E_x mean over draws of (Σ_c ε_c √p_c ∂ log p_c / ∂θ)², ε the `signs` [N, draws, K]."""
    total = _Total(model)
    for sample, draws in zip(_samples(total.model, examples, logits), signs, strict=True):
        for sign in draws:
            root_p = (sample.log_p / 2).exp().detach()
            total.add((sign[sample.entering] * root_p * sample.log_p).sum(), weight=1 / len(draws))
    return total.over(len(examples))


def hybrid(
    model: Classifier,
    examples: Examples,
    threshold: float,
    dice: Tensor,
    signs: Tensor,
    logits: Logits = "visible",
) -> Diagonal:
    """E_x of Σ_c p_c (∂ log p_c / ∂θ)² over the columns √p_c (e_c - p) of squared length `threshold` or more, plus the
    mean of (Σ_c ε_c √p_c ∂ log p_c / ∂θ)² over draws of signs for the others, or, where these add up to x < 1
    thresholds, 1/x times that with probability x. Samples that would take as many passes as the exact Fisher get it.

    `dice` [N], uniform in [0, 1); `signs` [Σ draws, K], sample after sample.
    """
    total, left = _Total(model), iter(signs)
    for sample, die in zip(_samples(total.model, examples, logits), dice.tolist(), strict=True):
        p = sample.log_p.exp().detach()
        lengths = (p.sqrt() * (torch.eye(len(p)).to(p) - p[:, None])).square().sum(0)  # one per column
        heavy = lengths >= threshold
        draws = float(lengths[~heavy].sum() / threshold)
        if int(heavy.sum()) + draws >= len(p) - 1:
            heavy, draws = torch.ones_like(heavy), 0.0
        for log_p in sample.log_p[heavy]:
            total.add(log_p, weight=log_p.exp())
        number = int(draws + die)
        for _ in range(number):
            signed = next(left)[sample.entering] * p.sqrt() * sample.log_p
            total.add(signed[~heavy].sum(), weight=1 / (number if draws >= 1 else draws))
    return total.over(len(examples))


def empirical(model: Classifier, examples: Examples, logits: Logits = "visible") -> Diagonal:
    """E_x (∂ log p_y / ∂θ)², y the true label."""
    total = _Total(model)
    for sample in _samples(total.model, examples, logits):
        total.add(sample.log_p[sample.label])
    return total.over(len(examples))


def argmax(model: Classifier, examples: Examples, logits: Logits = "visible") -> Diagonal:
    """E_x (∂ max_c log p_c / ∂θ)²."""
    total = _Total(model)
    for sample in _samples(total.model, examples, logits):
        total.add(sample.log_p.max())
    return total.over(len(examples))


def reversed(model: Classifier, examples: Examples, logits: Logits = "visible") -> Diagonal:
    """E_x (∂ CE(-z, y) / ∂θ)², z the active logits."""
    total = _Total(model)
    for sample in _samples(total.model, examples, logits):
        total.add(F.cross_entropy(-sample.z, sample.label))
    return total.over(len(examples))


def batched(model: Classifier, examples: Examples, batch_size: int, logits: Logits = "visible") -> Diagonal:
    """The mean over batches of (∂ mean_b -log p_y / ∂θ)², a short last batch counting as much as the others."""
    total, batches = _Total(model), 0
    for batch in examples.batches(batch_size):
        losses = [-sample.log_p[sample.label] for sample in _samples(total.model, batch, logits)]
        total.add(torch.stack(losses).mean())
        batches += 1
    return total.over(batches)


@dataclass(frozen=True)
class _Sample:
    z: Tensor  # [k], the active logits
    entering: Tensor  # [K] bool
    label: Tensor  # scalar, an index into z

    @property
    def log_p(self) -> Tensor:
        return self.z.log_softmax(0)


def _samples(model: Classifier, examples: Examples, logits: Logits) -> Iterator[_Sample]:
    for batch in examples.to(model.device).batches(1):
        with nothing_kept(model):
            z = model(batch.images).logits
        if logits == "visible":
            entering = model.restrict(z, batch.task_ids)[0] > -torch.inf
        else:
            entering = model.revealed if logits == "seen" else torch.ones_like(model.revealed)
        yield _Sample(z[0, entering], entering, entering[: int(batch.labels)].sum())


class _Total:
    """A sum of weighted squares of gradients, on a float64 copy of the model in eval mode."""

    def __init__(self, model: Classifier) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self._trainable = trainable(self.model)
        self._sums: Parameters = {name: torch.zeros_like(values) for name, values in self._trainable.items()}

    def add(self, loss: Tensor, weight: Tensor | float = 1.0) -> None:
        gradients = torch.autograd.grad(
            loss, list(self._trainable.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            for name, gradient in zip(self._trainable, gradients, strict=True):
                self._sums[name] += weight * gradient.square()

    def over(self, count: int) -> Diagonal:
        return Diagonal({name: total / count for name, total in self._sums.items()})
