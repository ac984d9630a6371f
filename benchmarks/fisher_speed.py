"""Time each way to compute a diagonal Fisher, in units of a forward and backward pass of the same model and batch."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from fisher_peers import DRAWS, PEERS, Call, Estimate, Peer
from fisher_truth import ESTIMATORS, error, mean_of
from machine import peak_bytes
from machine import seconds as wall_seconds
from nets import Subject, unsettle

from cl_runner.fisher import reference
from cl_runner.fisher.curvature import Diagonal
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples

OURS = "cl_runner"
SKIPPED = ("argmax", "reversed")  # the same work as `empirical`
RIGHT, NEAR = 1e-3, 0.5  # errors below which no further way of a peer is tried; the second is for random draws
SOON = 0.8  # seconds per row and round, at least
SHOWN = 100  # characters of an error message


@dataclass(frozen=True)
class Settings:
    device: torch.device
    rounds: int
    batches: int  # per call, at most
    limit: float  # seconds per call, roughly
    rows: list[str]  # parts of the names of those to measure; empty: all


@dataclass
class Row:
    """One way to compute an estimate, and what has been measured of it."""

    title: str
    estimates: str
    draws: int  # calls whose mean is compared with `exact`; 0: compared with its own definition
    ways: Iterator[Call]
    error: str = "-"
    size: int = 0  # samples per call
    ratios: list[float] = field(default_factory=list)  # to U, one per round
    memory: int | None = None

    @property
    def name(self) -> str:
        return f"{self.estimates}: {self.title}"


def measured(subject: Subject, num_classes: int, settings: Settings, only_exact: bool) -> list[str]:
    """The lines of a table: every selected row on `subject`."""
    model = subject.build(num_classes, settings.device)
    unsettle(model)
    model.eval()
    examples = subject.examples(settings.batches * subject.batch_size, num_classes, settings.device)
    rows = [row for row in _rows(model, subject.batch_size) if not only_exact or row.estimates == "exact"]
    wanted = [part.lower() for part in settings.rows]
    rows = [row for row in rows if not wanted or any(part in row.name.lower() for part in wanted)]

    truths = Truths(model, examples[: 4 if num_classes <= 10 else 2])
    step = Step(model, examples[: subject.batch_size], settings.device)
    for row in rows:  # one by one, since each holds a copy of the network and whatever its library keeps
        _say(f"{subject.title}, {num_classes} outputs: {row.name}")
        estimate = _right_way(row, truths)
        if estimate is not None and _plan(row, estimate, examples, subject.batch_size, settings):
            call = partial(estimate, examples[: row.size])
            for _ in range(settings.rounds):
                _time(row, call, step, settings.device)
            del call
        del estimate
    return _table(rows, subject, num_classes, step)


def _rows(model: Model, batch_size: int) -> Iterator[Row]:
    """All rows, grouped by what they estimate, ours first."""
    kinds = dict.fromkeys([*ESTIMATORS, *(peer.estimates for peer in PEERS)])
    for kind in kinds:
        if kind in ESTIMATORS and kind not in SKIPPED:
            yield _ours(kind, model, batch_size)
        for peer in PEERS:
            if peer.estimates == kind:
                yield _theirs(peer, model, batch_size)


def _ours(kind: str, model: Model, batch_size: int) -> Row:
    estimator = ESTIMATORS[kind](batch_size=batch_size)
    random = kind not in ("exact", "empirical", "batched")

    def prepare() -> Estimate:
        # Another seed for each call, since a peer draws from the global generator.
        seeds = iter(range(1_000_000))
        return lambda examples: replace(estimator, seed=next(seeds))(model, examples)

    return Row(OURS, kind, DRAWS if random else 0, iter([prepare]))


def _theirs(peer: Peer, model: Model, batch_size: int) -> Row:
    against_exact = peer.estimates in ("sampled", "products")
    return Row(peer.title, peer.estimates, peer.draws if against_exact else 0, peer.ways(model, batch_size))


class Step:
    """The unit: a forward and backward pass of a batch in eval mode, with gradients for all parameters."""

    def __init__(self, model: Model, batch: Examples, device: torch.device) -> None:
        self._model, self._batch, self._device = model, batch, device
        self.all: list[float] = []
        self._once()
        self.memory = peak_bytes(self._once, self._device)
        self._about = seconds(self._once, self._device)
        self._model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Seconds per sample: the mean over enough steps to take a while."""

        def several() -> None:
            for _ in range(times):
                self._once()

        times = max(1, round(SOON / 4 / self._about))
        self.all.append(seconds(several, self._device) / times)
        self._model.zero_grad(set_to_none=True)
        return self.all[-1] / len(self._batch)

    def _once(self) -> None:
        self._model.zero_grad(set_to_none=True)
        F.cross_entropy(self._model(self._batch.images).logits, self._batch.labels).backward()


class Truths:
    """The values of the definitions on a few samples, computed on first use."""

    def __init__(self, model: Model, examples: Examples) -> None:
        self._model, self.examples = model, examples
        self._known: dict[str, Diagonal] = {}

    def of(self, row: Row) -> Diagonal:
        name = "exact" if row.draws else row.estimates
        if name not in self._known:
            drawn = {"batch_size": len(self.examples)} if name == "batched" else {}
            self._known[name] = getattr(reference, name)(self._model, self.examples, **drawn)
        return self._known[name]


def _right_way(row: Row, truths: Truths) -> Estimate | None:
    """The first way that is correct, else the one with the least error, or None if all fail. Records the error."""
    truth, chosen, least = truths.of(row), None, float("inf")
    for way in row.ways:
        try:
            torch.manual_seed(0)
            estimate = way()
            found = estimate(truths.examples)
            if row.draws > 1 and error(found, truth) < float("inf"):
                found = mean_of(row.draws, lambda _, estimate=estimate: estimate(truths.examples))
        except Exception as problem:  # whatever a library raises goes into the table
            if chosen is None:
                row.error = f"fails: {_line(problem)}"
            continue
        wrong = error(found, truth)
        if chosen is None or wrong < least:
            chosen, least = estimate, wrong
            row.error = _described(wrong, row.draws, len(truth.values) - len(found.values))
        if wrong < (NEAR if row.draws else RIGHT):
            break
    return chosen


def _described(wrong: float, draws: int, missing: int) -> str:
    text = "wrong shapes" if wrong == float("inf") else f"{wrong:.1e}" if wrong < 1e-2 else f"{wrong:.2f}"
    text += " (random)" if draws else ""
    return f"{text}, lacks {missing} parameters" if missing else text


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Processor time if there is one thread, since other load affects it less; else wall-clock time."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return wall_seconds(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def _plan(row: Row, estimate: Estimate, examples: Examples, batch_size: int, settings: Settings) -> bool:
    """Choose the samples per call by timing a quarter of a batch; measure the memory of a call on a whole batch."""
    part = max(1, batch_size // 4)
    try:
        if settings.device.type == "cuda":
            estimate(examples[:part])  # compiles kernels
        guess = seconds(partial(estimate, examples[:part]), settings.device) * batch_size / part
        if guess > settings.limit:
            row.size = max(1, int(batch_size * settings.limit / guess))
        else:
            row.size = batch_size * min(settings.batches, max(1, int(settings.limit / guess)))
            if settings.device.type == "cuda":
                estimate(examples[:batch_size])  # chooses kernels, in memory of their own
            row.memory = peak_bytes(partial(estimate, examples[:batch_size]), settings.device)
    except Exception as problem:  # most likely out of memory
        row.error = f"fails with a batch: {_line(problem)}"
        return False
    return True


def _time(row: Row, call: Callable[[], object], step: Step, device: torch.device) -> None:
    """A round: the median ratio over enough turns to take a while, each between two measurements of the unit."""
    ratios, spent, before = [], 0.0, step.seconds()
    while spent < SOON:
        taken, after = seconds(call, device), step.seconds()
        ratios.append(taken / row.size / ((before + after) / 2))
        spent, before = spent + taken, after
    row.ratios.append(statistics.median(ratios))


def _table(rows: list[Row], subject: Subject, num_classes: int, step: Step) -> list[str]:
    times = sorted(step.all)
    unit = f"{1000 * statistics.median(times):.1f} ms ({1000 * times[0]:.1f}–{1000 * times[-1]:.1f})" if times else "-"
    held = "" if step.memory is None else f"; peak memory of a step {step.memory / 1e6:.0f} MB"
    lines = [
        f"**{subject.title}, {num_classes} outputs, batch {subject.batch_size}**: U = {unit}{held}",
        "",
        "| estimates | by | U | spread | memory, of a step | error |",
        "|---|---|---|---|---|---|",
    ]
    for before, row in pairwise([None, *rows]):
        assert row is not None
        kind = "" if before is not None and before.estimates == row.estimates else row.estimates
        lines.append(f"| {kind} | {row.title} | {' | '.join(_cells(row, subject.batch_size, step))} | {row.error} |")
    return lines


def _cells(row: Row, batch_size: int, step: Step) -> tuple[str, str, str]:
    if not row.ratios:
        return "-", "-", "-"
    about = "≈ " if row.size < batch_size else ""
    memory = f"{row.memory / step.memory:.2f}" if row.memory is not None and step.memory else "-"
    middle = statistics.median(row.ratios)
    return f"{about}{_ratio(middle)}", f"{_ratio(min(row.ratios))}–{_ratio(max(row.ratios))}", memory


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _line(problem: Exception) -> str:
    first = str(problem).strip().partition("\n")[0].replace("|", "/")
    text = f"{type(problem).__name__}: {first}"
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
