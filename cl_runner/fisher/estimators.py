"""Estimators of the Fisher, which differ only in their output vectors.

For one sample with logits z(θ) and probabilities p = softmax(z), F = Jᵀ (diag(p) - p pᵀ) J, J = ∂z/∂θ. Any vectors v
with Σ v vᵀ = diag(p) - p pᵀ, exactly or in expectation, give it as Σ (Jᵀ v)(Jᵀ v)ᵀ: one backward pass per vector. The
result is the mean over samples, or what a representation keeps of it: usually the diagonal, Σ (Jᵀ v)².
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.curvature import Curvature, Diagonal, finite
from cl_runner.fisher.engine import undisturbed, wide
from cl_runner.fisher.representations import Accumulator, Representation, rounds
from cl_runner.gradients.graphs import release_pool
from cl_runner.gradients.kernels import Precision
from cl_runner.gradients.layers import BatchStatisticsError
from cl_runner.gradients.passes import SlicedVectors
from cl_runner.models.model import Classifier, PretrainedView
from cl_runner.randomness import derive_seed
from cl_runner.ranges import Count, Seed
from cl_runner.streams.base import Examples

log = logging.getLogger("cl_runner")

Logits = Literal["visible", "seen", "all"]


@dataclass(frozen=True)
class Report:
    """The cost and the quality of an estimate.

    Args:
        seconds: for the Fisher itself. Estimating its error comes on top: up to an eighth, with 256 samples or more.
        samples: how many the mean is over.
        backward_passes: one per sample and vector, not counting those for the error.
        trace: of the Fisher.
        relative_error: an estimate of the diagonal's |found - expected| / |expected| over all entries together, given
            the samples; None where nothing was drawn or the Fisher is zero, and for Kronecker factors, which add an
            error of their own. It knows only the samples it looks at: where a few rare draws make up the Fisher, it
            can be far too small.
    """

    seconds: float
    samples: int
    backward_passes: int
    trace: float
    relative_error: float | None


@dataclass(kw_only=True)
class Estimator(ABC):
    """A Fisher from per-sample gradients; subclasses define the output vectors.

    Args:
        num_samples: how many samples, drawn without replacement; None: all.
        pretrained_samples: the same for the pretrained model under its own head.
        batch_size: samples in memory at a time; does not change the result (but see `Batched`).
        logits: which outputs are active: those visible to the sample's task, those revealed so far, or all.
        seed: with the task, determines the choice of samples and the vectors' noise.
        precision: of the products that give the weight gradients; forward pass and activations keep theirs.
        representation: what is kept of the matrix: its diagonal; Kronecker factors per layer (kfac; Martens & Grosse,
            2015, https://arxiv.org/abs/1503.05671), or their eigenvectors with the squares along them (ekfac; George
            et al., 2018, https://arxiv.org/abs/1806.03884), which takes the passes twice; or all of it (full), for a
            few thousand parameters.

    A call leaves the model's modes, buffers, parameters and their gradients as they were. It uses un-augmented images
    and the parameters' own precision, since under autocast single layers are off by a tenth.
    """

    num_samples: Count | None = None
    pretrained_samples: Count | None = None
    batch_size: Count = 64
    logits: Logits = "visible"
    seed: Seed = 0
    precision: Precision = "fp32"
    representation: Representation = "diagonal"

    needs_labels: ClassVar[bool] = False
    representations: ClassVar[tuple[Representation, ...]] = get_args(Representation)  # that this estimator can have
    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)

    @property
    def called(self) -> str:
        """What a user wrote to choose it."""
        return f"fisher={type(self).__name__.lower()}"

    def __post_init__(self) -> None:
        """Raises ConfigError for a representation or a precision that it cannot have."""
        for field, known in (("representation", self.representations), ("precision", self.precisions)):
            if (value := getattr(self, field)) not in known:
                those = " or ".join(", ".join(known).rsplit(", ", 1))
                name = type(self).__name__.lower()
                raise ConfigError(f"fisher.{field}", f"expected {those} for {name}, got {value}")
        if self.representation != "diagonal" and self.precision != "fp32":
            message = f"expected fp32 for the {self.representation} representation, got {self.precision}"
            raise ConfigError("fisher.precision", message)

    def check(self, model: Classifier, image_shape: tuple[int, ...]) -> None:
        """Try the model's layers on two noise images [C, H, W], to fail before training instead of after a task.

        Raises ConfigError for a model whose Fisher cannot be computed or represented.
        """
        try:
            self._try_out(model, image_shape)
        except BatchStatisticsError as error:
            advice = "only fisher=batched with train_mode takes it as it is"
            raise ConfigError("fisher", f"{error}; {advice}") from error
        except ValueError as error:
            raise ConfigError("fisher", str(error)) from error

    def _try_out(self, model: Classifier, image_shape: tuple[int, ...]) -> None:
        images = torch.randint(256, (2, *image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with self._undisturbed(model), torch.no_grad():
            accumulator = next(self.accumulators(model))
            inputs = model.preprocess(images.to(model.device))
            accumulator.add(inputs, 1, lambda _, logits: torch.ones_like(logits)[:, None])

    @abstractmethod
    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Output vectors [B, V, K], from `logits` [B, K] (-inf: inactive), `labels` [B] and rows of `noise`."""

    def noise(self, num_samples: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Random numbers for the vectors, [N, ...] on the CPU: for all samples at once, whatever the batch size."""
        return torch.empty(num_samples, 0)

    def passes(self, num_classes: int) -> int:
        """Backward passes per sample, at most."""
        return 1

    def accumulators(self, model: Classifier) -> Iterator[Accumulator]:
        """The accumulators to add all samples to, one after the other; the last one holds the result."""
        return rounds(model, self.representation, self.precision)

    def for_pretrained(self) -> "Estimator":
        """This estimator with `pretrained_samples`, or a `Probe` where this one needs true labels."""
        if not self.needs_labels:
            return replace(self, num_samples=self.pretrained_samples)
        log.info("%s needs true labels; the pretrained head has none, so probe takes its place", self.called)
        shared: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Estimator)}
        return replace(Probe(**shared), num_samples=self.pretrained_samples)

    def __call__(self, model: Classifier, examples: Examples) -> Curvature:
        """The Fisher of every trainable parameter, under the model's own names.

        Raises TypeError for a model that is no Classifier; ValueError where there are no examples, an example has no
        active outputs or its label is not among them, the model's answer to a sample depends on the others or on
        chance, or the Fisher is not finite.
        """
        with self._begun(model, examples) as (prepared, generator):
            return finite(self._mean(model, prepared, generator)[0])

    def estimate(self, model: Classifier, examples: Examples) -> tuple[Curvature, Report]:
        """What a call returns, with a report; raises what a call raises."""
        start = time.perf_counter()
        with self._begun(model, examples) as (prepared, generator):
            fisher, passes = self._mean(model, prepared, generator)
            trace = float(finite(fisher).trace())
            seconds = time.perf_counter() - start
            error = None
            if self.by_chance(prepared) and self.representation not in ("kfac", "ekfac"):
                error = self._relative_error(fisher.diagonal(), model, prepared, generator)
        return fisher, Report(seconds, len(prepared), passes, trace, error)

    def prepared(self, model: Classifier, examples: Examples) -> Examples:
        """The samples, with whatever must be known about all of them in advance as extras."""
        return examples

    def by_chance(self, prepared: Examples) -> bool:
        """Whether the vectors are random, so that there is an error to estimate."""
        return False

    def seed_for(self, examples: Examples) -> int:
        """A different seed for each task: with the same draws, the errors of their Fishers would add up in their sum.
        A prime apart, as neither the seeds of a sweep are nor a task's own (randomness.task_seed)."""
        return self.seed + 15_485_863 * int(examples.task_ids.max()) if len(examples) else self.seed

    @contextmanager
    def _begun(self, model: Classifier, examples: Examples) -> Iterator[tuple[Examples, torch.Generator]]:
        seed = self.seed_for(examples)
        if self.num_samples is not None and self.num_samples < len(examples):
            # With `seed` itself, task 0 of a run of seed 0 would give the samples that its first epoch began with.
            chosen = torch.Generator().manual_seed(derive_seed(seed, "samples of the Fisher"))
            examples = examples[torch.randperm(len(examples), generator=chosen)[: self.num_samples]]
        if len(examples) == 0:
            raise ValueError("expected at least one example to take the mean over, got none")
        with self._undisturbed(model):
            yield self.prepared(model, examples), torch.Generator().manual_seed(seed)

    @contextmanager
    def _undisturbed(self, model: Classifier) -> Iterator[None]:
        if not isinstance(model, Classifier):
            raise TypeError(
                f"expected a Classifier, such as models.model.Network(backbone, head), got {type(model).__name__}"
            )
        try:
            with undisturbed(model), torch.autocast(model.device.type, enabled=False):
                yield
        finally:
            release_pool()  # training can use the memory of replayed passes

    def _mean(self, model: Classifier, prepared: Examples, generator: torch.Generator) -> tuple[Curvature, int]:
        """The mean over samples, and how many backward passes it took."""
        made = 0

        def counted(vectors: SlicedVectors, rows: slice, logits: Tensor) -> Tensor:
            nonlocal made
            found = vectors(rows, logits)
            made += found.shape[0] * found.shape[1]
            return found

        for accumulator in self.accumulators(model):
            for batch, passes, vectors in self._batches(model, prepared, generator):
                with torch.no_grad():
                    inputs = model.preprocess(batch.images)
                accumulator.add(inputs, passes, partial(counted, vectors))
            accumulator.samples = len(prepared)  # including those in no batch, which have no vector
        return accumulator.curvature(), made

    def _batches(
        self, model: Classifier, prepared: Examples, generator: torch.Generator
    ) -> Iterator[tuple[Examples, int, SlicedVectors]]:
        """Batches on the model's device, the most vectors per sample, and the vectors."""
        passes = self.passes(len(model.revealed))
        noise = self.noise(len(prepared), len(model.revealed), generator).split(self.batch_size)
        for batch, drawn in zip(prepared.batches(self.batch_size), noise, strict=True):
            batch = batch.to(model.device)
            yield batch, passes, partial(self._vectors, model, batch, drawn.to(model.device))

    def _relative_error(
        self, fisher: Diagonal, model: Classifier, prepared: Examples, generator: torch.Generator
    ) -> float | None:
        """The diagonal's error, from two further, independent estimates a and b of it on m of the n samples.

        Given the samples, their contributions are independent, and E|a - b|² is twice the variance of a mean over m.
        The mean over all n has m/n times that variance: m/n E|a - b|² / 2.
        """
        size = min(len(prepared), max(16, len(prepared) // 16))
        some = prepared[torch.randperm(len(prepared), generator=generator)[:size]]
        alone = replace(self, representation="diagonal")
        one, other = (alone._mean(model, some, generator)[0].diagonal() for _ in range(2))
        distance = _norm(one.plus(other, -1)) * (size / len(prepared) / 2) ** 0.5
        whole = _norm(fisher)
        if distance == 0:
            return 0.0
        return distance / whole if whole else None

    def _vectors(self, model: Classifier, batch: Examples, noise: Tensor, rows: slice, logits: Tensor) -> Tensor:
        # Wide: for a confident model, e_y - p is a small difference of large numbers.
        entering = wide(self._entering(model, logits, batch[rows]))
        return self.vectors(entering, batch.labels[rows], noise[rows]).to(logits)

    def _entering(self, model: Classifier, logits: Tensor, batch: Examples) -> Tensor:
        """`logits` [B, K] with -inf for inactive outputs. Raises ValueError where that leaves none."""
        restricted = self._restrict(model, logits, batch.task_ids)
        self._check(model, batch, restricted != -torch.inf)
        return restricted

    def _restrict(self, model: Classifier, logits: Tensor, task_ids: Tensor) -> Tensor:
        if self.logits == "visible":
            return model.restrict(logits, task_ids)
        return logits.masked_fill(~model.revealed, -torch.inf) if self.logits == "seen" else logits

    def _check(self, model: Classifier, batch: Examples, entering: Tensor) -> None:
        if self.needs_labels and isinstance(model, PretrainedView):
            raise ValueError(
                f"{self.called} needs true labels, and the pretrained head has none: ask `for_pretrained()`"
            )
        blind = ~entering.any(1)
        if blind.any():
            task = int(batch.task_ids[blind][0])
            raise ValueError(
                f"{self.called}: no output is active for task {task} (logits={self.logits}); reveal the task first"
            )
        if not self.needs_labels:
            return
        known = (entering & (batch.labels[:, None] == torch.arange(entering.shape[1]).to(batch.labels))).any(1)
        if not known.all():
            row = int((~known).nonzero()[0])
            there = f"those of task {int(batch.task_ids[row])}: {entering[row].nonzero()[:, 0].tolist()}"
            raise ValueError(
                f"{self.called}: expected labels among the active outputs (logits={self.logits}), {there}; "
                f"got {int(batch.labels[row])}"
            )


class Exact(Estimator):
    """The definition, output by output: Σ v vᵀ = diag(p) - p pᵀ, with one vector fewer than there are outputs.

    The textbook's vectors √p_c (e_c - p) are linearly dependent. These are the columns of the matrix's Cholesky factor,
    each e_c against the outputs after it: √(p_c s_{c+1} / s_c) (e_c - Σ_{j>c} p_j e_j / s_{c+1}), s_c = Σ_{j≥c} p_j. A
    task of two classes takes one pass.
    """

    def passes(self, num_classes: int) -> int:
        return num_classes - 1

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        return exact_vectors(logits)


def exact_vectors(logits: Tensor) -> Tensor:
    """`Exact`'s vectors [B, V, K] from `logits` [B, K]; V is one less than the most active outputs of any sample."""
    entering = logits != -torch.inf
    # Active outputs first: so a batch takes one vector fewer than there are of them.
    first = entering.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(entering.sum(1).max())]
    p = logits.softmax(1).gather(1, first)  # [B, M]
    tails = p.flip(1).cumsum(1).flip(1)
    divisors = tails.clamp_min(torch.finfo(p.dtype).tiny)  # no probability left: nothing to tell apart
    scale = (p[:, :-1] * (tails[:, 1:] / divisors[:, :-1])).sqrt()
    others = (p[:, None] / divisors[:, 1:, None]).triu(1)  # [B, M-1, M]
    columns = scale[:, :, None] * (torch.eye(p.shape[1]).to(p)[:-1] - others)
    vectors = columns.new_zeros(*columns.shape[:2], logits.shape[1])
    return vectors.scatter(2, first[:, None].expand_as(columns), columns)


@dataclass(kw_only=True)
class Sampled(Estimator):
    """Labels drawn from the model: v = e_c - p, c ~ p, the mean over `draws`. Unbiased.

    Its relative variance is about 1/(1 - p_max): for a confident model, few draws are informative.
    """

    draws: Count = 1

    def noise(self, num_samples: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Exponential clocks [N, draws, K]: divided by p, the first to ring is clock c with probability p_c."""
        clocks = torch.empty(num_samples, self.draws, num_classes).exponential_(generator=generator)
        return clocks.clamp_min(torch.finfo(clocks.dtype).tiny)  # inactive outputs would give 0 / 0

    def passes(self, num_classes: int) -> int:
        return self.draws

    def by_chance(self, prepared: Examples) -> bool:
        return True

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        p = logits.softmax(1)[:, None]
        return (unit((p / noise).argmax(2), p) - p) / self.draws**0.5


@dataclass(kw_only=True)
class Probe(Estimator):
    """Random signs on all outputs at once: v = s∘ε - p (s·ε), s = √p, ε = ±1, the mean over `draws`.

    Unbiased, with a relative variance of at most 2 whatever p is (curvature propagation, Martens et al., 2012,
    https://arxiv.org/abs/1206.6464).
    """

    draws: Count = 1

    def noise(self, num_samples: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Signs [N, draws, K], int8."""
        coins = torch.randint(2, (num_samples, self.draws, num_classes), generator=generator, dtype=torch.int8)
        return 2 * coins - 1

    def passes(self, num_classes: int) -> int:
        return self.draws

    def by_chance(self, prepared: Examples) -> bool:
        return True

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        p = logits.softmax(1)[:, None]
        signed = p.sqrt() * noise
        return (signed - p * signed.sum(2, keepdim=True)) / self.draws**0.5


class Empirical(Estimator):
    """The true labels: v = e_y - p. Not the true Fisher: it vanishes as the model fits its data."""

    needs_labels = True

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        p = logits.softmax(1)[:, None]
        return unit(labels[:, None], p) - p


class Argmax(Estimator):
    """The labels that the model predicts: v = e_ŷ - p. Biased, and far too small where the model is confident."""

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        p = logits.softmax(1)[:, None]
        return unit(logits.argmax(1, keepdim=True), p) - p


class Reversed(Estimator):
    """The gradient of the cross-entropy of reversed logits: v = e_y - softmax(-z), over the active outputs.

    Not a Fisher; it does not vanish as the model fits (Liu & Chang, 2026, https://arxiv.org/abs/2603.18596).
    """

    needs_labels = True

    def vectors(self, logits: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        p = torch.where(logits == -torch.inf, logits, -logits).softmax(1)[:, None]
        return unit(labels[:, None], p) - p


def unit(classes: Tensor, like: Tensor) -> Tensor:
    """e_c, [..., K], for `classes` [...], with the K and dtype of `like`."""
    return F.one_hot(classes, like.shape[-1]).to(like)


def _norm(fisher: Diagonal) -> float:
    """√Σ F², in float64: squares of small numbers underflow float32."""
    return sum(float(values.cpu().double().square().sum()) for values in fisher.values.values()) ** 0.5
