"""Check that the diagonal Fisher is correct, and measure what it costs.

    python benchmarks/fisher.py correctness [--models mlp vit_tiny ...]
    python benchmarks/fisher.py sizes [--models ...]
    python benchmarks/fisher.py speed [--models ...] [--classes 10 100] [--rounds 3] [--rows exact loop ...]

correctness: compare every estimator on every network with a float64 loop, compare batch sizes, and check that the model
is left unchanged. sizes: compare batch sizes only.

speed: the time of every estimator, and of other packages that compute the same (`pip install -e '.[bench]'`; those not
installed show up as failed), in units of U: a forward and backward pass of the same model and batch in eval mode, with
gradients for every parameter. With one thread it is processor time. U and a row alternate in one process; a round is
the median ratio of many such turns (fewer if they are slow), and the table shows the rounds' median, minimum and
maximum. Memory is the peak of a call on one batch beyond what was allocated before it, relative to that of U. Errors
are relative, of the whole diagonal in float32 against float64 on a few samples; `random` ones are of the mean of a few
calls against `exact`, so mostly noise. With several --classes the first gets all rows, the others only `exact`.
--rows takes parts of names (`estimates: by`). A row that would take longer than --limit seconds per batch is measured
on fewer samples, marked ≈, and has no memory.

Weights are fresh and pixels random, so nothing is downloaded.
Tables are printed; --write puts them into RESULTS.md, between the comments that mark their place there.
"""

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fisher_peers import PEERS
from fisher_speed import Settings, measured
from fisher_truth import CALLS, ESTIMATORS, UNDEFINED, defined, error, in_float64, mean_of, with_draws
from machine import described, limit_memory
from nets import SUBJECTS, TIMED, Subject, unsettle

from cl_runner.models.model import Model

RESULTS = Path(__file__).parent / "RESULTS.md"
OUTPUTS, SAMPLES, BATCH = 7, 5, 2  # for the correctness tables; the last batch is a single sample
SIZES, MANY = (1, 7, 64), 500  # of batches
CHEAP = ("mlp", "bias_free", "partly_frozen", "vit_torchvision")  # networks that get a batch of `MANY`
EVERY = ("mlp", "partly_frozen")  # networks on which every estimator, not only `probe`, gets different batch sizes


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of the peers, about versions of Python and PyTorch
    said = _Said()
    logging.getLogger("cl_runner").addHandler(said)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        limit_memory()
    start = time.perf_counter()
    names: list[str] = arguments.models or list(TIMED if arguments.mode == "speed" else SUBJECTS)
    if arguments.mode == "correctness":
        _show("fisher correctness", [described(device), "", *correctness(names, device)], said, arguments.write)
    elif arguments.mode == "sizes":
        _show("fisher sizes", [described(device), "", *sizes(names, device)], said, arguments.write)
    else:
        settings = Settings(device, arguments.rounds, arguments.batches, arguments.limit, arguments.rows)
        for number, num_classes in enumerate(arguments.classes):
            for name in names:
                table = measured(SUBJECTS[name], num_classes, settings, only_exact=number > 0)
                lines = [f"{described(device)}, {arguments.rounds} rounds", "", *table]
                _show(f"fisher speed {name} {num_classes}", lines, said, arguments.write)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("correctness", "sizes", "speed"))
    parser.add_argument("--models", nargs="*", choices=list(SUBJECTS), metavar="NAME", help=", ".join(SUBJECTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--classes", nargs="*", type=int, default=[10, 100], help="numbers of outputs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="a call, at most")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a call, about")
    parser.add_argument("--rows", nargs="*", default=[], metavar="PART", help="parts of names; none: all")
    return parser.parse_args()


def correctness(names: list[str], device: torch.device) -> list[str]:
    """Two tables: every estimator against its definition, and Fishers at different batch sizes."""
    heads = [f"{name} (mean of {CALLS}, to exact)" if name in UNDEFINED else name for name in ESTIMATORS]
    lines = [
        f"Relative error of the diagonal to float64 loops; {SAMPLES} samples in batches of {BATCH}, {OUTPUTS} outputs. "
        "Last columns: the largest with the model in float64, a plain loop over classes in float32, and whether "
        "modes, buffers, parameters, gradients and hooks are as they were.",
        "",
        f"| model | {' | '.join(heads)} | float64 | loop, float32 | untouched |",
        "|---" * (len(heads) + 4) + "|",
    ]
    lines += [f"| {SUBJECTS[name].title} | {' | '.join(_errors(SUBJECTS[name], device))} |" for name in names]
    return [*lines, "", *sizes(names, device)]


def sizes(names: list[str], device: torch.device) -> list[str]:
    """A table: Fishers at different batch sizes."""
    lines = ["Largest relative difference between the Fishers of different sizes of batch:", ""]
    lines += ["| model | estimator | sizes | samples | float32 | float64 |", "|---|---|---|---|---|---|"]
    for name in names:
        lines += [f"| {SUBJECTS[name].title} | {' | '.join(cells)} |" for cells in _differences(name, device)]
    return lines


def _errors(subject: Subject, device: torch.device) -> list[str]:
    model = _unsettled(subject, device)
    wide, before = in_float64(model), _state(model)
    examples = subject.examples(SAMPLES, OUTPUTS, device)
    cells, in_double = [], [0.0]
    for name, kind in ESTIMATORS.items():
        estimator = with_draws(kind(batch_size=BATCH), 2)
        expected = defined(name, estimator, model, examples)
        found = mean_of(
            CALLS if name in UNDEFINED else 1, lambda seed, e=estimator: replace(e, seed=seed)(model, examples)
        )
        missing = len(expected.values) - len(found.values)
        cells.append(f"{error(found, expected):.1e}" + (f", **lacks {missing} parameters**" if missing else ""))
        if name not in UNDEFINED:
            in_double.append(error(estimator(wide, examples), expected))
        print(f"{subject.title}: {name} {cells[-1]}", file=sys.stderr, flush=True)
    (peer,) = [peer for peer in PEERS if peer.package is None and peer.name.startswith("loop, one sample and class")]
    *_, in_nchw = peer.ways(model, BATCH)
    floor = error(in_nchw()(examples), defined("exact", ESTIMATORS["exact"](), model, examples))
    return [*cells, f"{max(in_double):.1e}", f"{floor:.1e}", "yes" if _same(before, _state(model)) else "**no**"]


def _differences(name: str, device: torch.device) -> Iterator[list[str]]:
    subject, batches = SUBJECTS[name], (*SIZES, MANY) if name in CHEAP else SIZES
    model, examples = _unsettled(subject, device), subject.examples(max(batches) + 1, OUTPUTS, device)
    models = model, in_float64(model)
    for kind in [kind for kind in ESTIMATORS if kind != "batched"] if name in EVERY else ["probe"]:
        cells = []
        for each in models:
            first, *others = (ESTIMATORS[kind](batch_size=size)(each, examples) for size in batches)
            cells.append(f"{max(error(other, first) for other in others):.1e}")
        print(f"{subject.title}: sizes of batch, {kind} {cells}", file=sys.stderr, flush=True)
        yield [kind, ", ".join(map(str, batches)), str(len(examples)), *cells]


def _unsettled(subject: Subject, device: torch.device) -> Model:
    model = subject.build(OUTPUTS, device)
    unsettle(model)
    return model


def _state(model: Model) -> list[Any]:
    """Everything that a call could change."""
    values = [value.clone() for value in model.state_dict().values()]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [(module.training, *(len(vars(module)[kind]) for kind in hooks)) for module in model.modules()]
    return [values, gradients, trainable, modules]


def _same(before: list[Any], after: list[Any]) -> bool:
    equal = all(torch.equal(one, other) for one, other in zip(before[0], after[0], strict=True))
    return equal and before[1:] == after[1:]


class _Said(logging.Handler):
    """Collects what the estimators log since it was last read: which path they took."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._messages[record.getMessage()] = None

    def taken(self) -> list[str]:
        messages, self._messages = list(self._messages), {}
        return messages


def _show(name: str, lines: list[str], said: _Said, write: bool) -> None:
    """Print a section and, if asked to, write it to RESULTS.md, in place of the one with that name or at the end."""
    lines += [f"\nLogged: {message}" for message in said.taken()]
    text = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end of {name} -->\n"
    print(text, flush=True)
    if not write:
        return
    page = RESULTS.read_text()
    place = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end of {re.escape(name)} -->\n", re.DOTALL)
    RESULTS.write_text(place.sub(lambda _: text, page) if place.search(page) else f"{page}\n{text}")


if __name__ == "__main__":
    main()
