"""Measure each Fisher estimator's error against `exact` on trained nets, and its cost: one table per net, one picture.

    python benchmarks/fisher_quality.py --data-root ROOT [--nets mnist cifar_half cifar_all]
        [--picture benchmarks/fisher_quality.png]

Each net is trained here with a fixed seed, on images in ROOT (laid out as for a run), until it is accurate enough on
them; the Fisher is over some of the same images. The error is |found - exact| / |exact| of the whole diagonal: mean ±
standard deviation over three seeds if an estimator draws samples. An estimator may report its own error
(`Report.relative_error`). Passes are backward passes per sample; seconds are processor time on one thread, which other
load affects less than wall-clock time, of a call relative to one of `exact`.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from fisher_truth import error
from machine import described
from strength import COLOURS, plt

from cl_runner.fisher.batched import Batched
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Argmax, Empirical, Estimator, Exact, Probe, Reversed, Sampled
from cl_runner.fisher.hybrid import Hybrid
from cl_runner.models.architecture import Architecture
from cl_runner.models.conv5 import Conv5
from cl_runner.models.mlp import MLP
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples, Scenario, Stream
from cl_runner.streams.split import Split

SEEDS = (0, 1, 2)
EPOCHS, RATE = 40, 1e-3  # at most; Adam's
TOP, BOTTOM = 4.0, 1e-3  # of the picture's error axis

# Row -> family (the colour) and estimator.
ROWS: dict[str, tuple[str, Estimator]] = {
    "empirical": ("empirical", Empirical()),
    "argmax": ("argmax", Argmax()),
    "batched, 128": ("batched", Batched(batch_size=128)),
    "reversed": ("reversed", Reversed()),
    **{f"sampled, {draws}": ("sampled", Sampled(draws=draws)) for draws in (1, 4)},
    **{f"probe, {draws}": ("probe", Probe(draws=draws)) for draws in (1, 4, 16)},
    **{f"hybrid, budget {budget:g}": ("hybrid", Hybrid(budget=budget)) for budget in (0.25, 1.0, 4.0)},
    "hybrid, tolerance 0.05": ("hybrid", Hybrid(tolerance=0.05)),
}
COLOUR = COLOURS | {"hybrid": "#56B4E9", "argmax": "#E69F00", "reversed": "#888888"}
MARKER = {"empirical": "^", "argmax": "v", "sampled": "o", "probe": "s", "hybrid": "D", "batched": "X", "reversed": "P"}
LARGE = ("empirical", "argmax")  # markers that others may hide


@dataclass(frozen=True)
class Net:
    """A network to train: the number of images, the accuracy to reach, and the number of images for the Fisher."""

    title: str
    data: str
    architecture: Architecture
    images: int
    batch_size: int
    accuracy: float
    samples: int


NETS = {
    "mnist": Net("MNIST, MLP 784-400-400-10", "mnist", MLP(), 60_000, 256, 0.995, 4000),
    "cifar_half": Net("CIFAR-100, Conv5, half trained", "cifar100", Conv5(), 10_000, 128, 0.5, 1000),
    "cifar_all": Net("CIFAR-100, Conv5, fully trained", "cifar100", Conv5(), 5_000, 64, 1.0, 400),
}


@dataclass(frozen=True)
class Row:
    """The results of one estimator over seeds."""

    name: str
    family: str
    passes: float
    errors: list[float]
    reported: list[float]
    share: float
    seconds: float  # processor time


@dataclass(frozen=True)
class Table:
    """A trained net's rows, and the cost of `exact`."""

    net: Net
    accuracy: float
    loss: float
    classes: int
    seconds: float
    rows: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="holds MNIST and CIFAR-100, laid out as for a run")
    parser.add_argument("--nets", nargs="*", choices=list(NETS), default=list(NETS), metavar="NAME")
    parser.add_argument("--picture", type=Path, help="where to write the picture (PNG)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{described(torch.device('cpu'))}, {len(SEEDS)} seeds of the draws")
    tables = []
    for name in arguments.nets:
        tables.append(measured(NETS[name], arguments.data_root))
        print("\n" + "\n".join(lines(tables[-1])), flush=True)
    if arguments.picture:
        draw(tables, arguments.picture)


def measured(net: Net, data_root: str) -> Table:
    recipe = Split(name=net.data, scenario=Scenario.CLASS, num_tasks=1, normalize=True)
    stream = recipe.load(data_root, torch.device("cpu"))
    examples = some(stream.tasks[0].train, net.images)
    model, accuracy, loss = trained(net, stream, examples)
    examples = examples[: net.samples]
    exact, seconds = Exact(), time.process_time()
    truth = exact(model, examples).diagonal()
    seconds = time.process_time() - seconds
    rows = []
    for name, (family, estimator) in ROWS.items():
        rows.append(row(name, family, estimator, model, examples, truth))
        print(f"{net.title}: {name}", file=sys.stderr)
    return Table(net, accuracy, loss, stream.num_classes, seconds, rows)


def some(examples: Examples, size: int) -> Examples:
    """Random examples in random order, so that the first of them are a random sample too."""
    return examples[torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:size]]


def trained(net: Net, stream: Stream, examples: Examples) -> tuple[Model, float, float]:
    """The model, its accuracy and its mean loss on `examples`; exits if it does not learn them."""
    generator = torch.Generator().manual_seed(0)
    model = net.architecture.build(stream)
    model.reveal(stream.tasks[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    accuracy = loss = 0.0
    for epoch in range(EPOCHS):
        model.train()
        for batch in examples.shuffled(net.batch_size, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images).logits, batch.labels).backward()
            optimizer.step()
        accuracy, loss = judged(model, examples)
        print(f"{net.title}: epoch {epoch + 1}, {accuracy:.2%} right, loss {loss:.3g}", file=sys.stderr)
        if accuracy >= net.accuracy:
            return model, accuracy, loss
    raise SystemExit(f"{net.title}: expected {net.accuracy:.1%} right within {EPOCHS} epochs, got {accuracy:.2%}")


@torch.no_grad()
def judged(model: Model, examples: Examples) -> tuple[float, float]:
    """Accuracy and mean loss, in eval mode."""
    model.eval()
    logits = torch.cat([model(batch.images).logits for batch in examples.batches(500)])
    right = logits.argmax(1) == examples.labels
    return float(right.float().mean()), float(F.cross_entropy(logits, examples.labels))


def row(name: str, family: str, estimator: Estimator, model: Model, examples: Examples, truth: Diagonal) -> Row:
    start = time.process_time()
    estimator(model, examples)
    seconds = time.process_time() - start
    found = [estimator.estimate(model, examples)]
    if found[0][1].relative_error is not None:
        found += [replace(estimator, seed=seed).estimate(model, examples) for seed in SEEDS[1:]]
    reports = [report for _, report in found]
    return Row(
        name=name,
        family=family,
        passes=statistics.mean(report.backward_passes / report.samples for report in reports),
        errors=[error(fisher.diagonal(), truth) for fisher, _ in found],
        reported=[report.relative_error for report in reports if report.relative_error is not None],
        share=statistics.mean(report.trace for report in reports) / float(truth.trace()),
        seconds=seconds,
    )


def lines(table: Table) -> list[str]:
    net, exact = table.net, f"| exact | {table.classes - 1} | 0 | – | 1 | 1 ({table.seconds:.3g} s) |"
    return [
        f"{net.title}: {table.accuracy:.2%} of {net.images:,} training images correct, mean loss {table.loss:.2g}; "
        f"the Fisher over {net.samples:,} of them.",
        "",
        "| Fisher | passes | error | error it reports | share of the trace | seconds / exact's |",
        "|---|---|---|---|---|---|",
        exact,
        *(
            f"| {row.name} | {row.passes:.3g} | {spread(row.errors)} | {spread(row.reported)} | {short(row.share)} "
            f"| {short(row.seconds / table.seconds)} |"
            for row in table.rows
        ),
    ]


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = short(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.1g}" if len(values) > 1 else mean


def short(value: float) -> str:
    """A number with at least two significant digits."""
    return f"{value:#.2g}" if value < 10 else f"{value:,.0f}"


def draw(tables: list[Table], path: Path) -> None:
    """Draw errors over passes. Those above `TOP` are drawn there, with their value; lines are cut off at `BOTTOM`."""
    shape = {"figsize": (4.1 * len(tables), 4.4), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False, **shape)
    for axes, table in zip(panels[0], tables, strict=True):
        for family, marker in MARKER.items():
            rows = sorted((row for row in table.rows if row.family == family), key=lambda row: row.passes)
            passes, means = [row.passes for row in rows], [statistics.mean(row.errors) for row in rows]
            heights = [min(mean, TOP) for mean in means]
            line = {"linestyle": "-" if len(rows) > 1 else "", "color": COLOUR[family], "label": family}
            axes.plot(
                passes,
                heights,
                marker=marker,
                markersize=12 if family in LARGE else 7,
                markeredgecolor="white",
                markeredgewidth=0.5,
                **line,
            )
            for place, mean in zip(passes, means, strict=True):
                if mean > TOP:
                    axes.annotate(f"↑ {mean:,.0f}", (place, TOP), (7, -4), textcoords="offset points", fontsize=10)
        axes.axvline(table.classes - 1, color=COLOUR["exact"], linestyle=":", label="exact (no error)")
        axes.set(xscale="log", yscale="log", ylim=(BOTTOM, 1.5 * TOP), xlabel="backward passes per sample")
        axes.set_title(f"{table.net.title}\n{table.accuracy:.1%} of the training images correct", fontsize=11)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative error of the diagonal")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * len(tables)), fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
