"""Plot EWC's accuracy over its strength for each Fisher estimator, beside the published curve, and print a table.

    python benchmarks/strength.py OUTPUTS [--picture benchmarks/strength.png]

OUTPUTS holds runs of `experiment=vandeven_fisher_mnist`, whose file has the published values and their source;
`cl-runner verify` shows which of them are reproduced.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from cl_runner.identity import display_name
from cl_runner.published import published

EXPERIMENT = "vandeven_fisher_mnist"
# Points of the published curves without a row in the experiment, read off the plot to within 0.2: % by strength.
READ_OFF = {
    "exact": {1e2: 91.7, 1e3: 96.8},
    "empirical": {1e3: 85.2, 1e5: 91.9, 1e7: 97.9, 1e8: 99.1},
    "batched": {1e7: 91.2, 1e9: 97.9, 1e10: 99.0},
}
# Okabe & Ito's palette, which is safe for the colour-blind.
COLOURS = {"exact": "#000000", "probe": "#D55E00", "sampled": "#009E73", "empirical": "#0072B2", "batched": "#CC79A7"}

Curve = dict[float, list[float]]  # strength -> accuracy in %, one per seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, help="where to write the picture (PNG)")
    arguments = parser.parse_args()
    curves = measured(arguments.folder)
    if not curves:
        raise SystemExit(f"expected a folder of finished runs of strategy=ewc, got {arguments.folder}")
    theirs = published_curves()
    print_table(curves, theirs)
    if arguments.picture:
        draw(curves, theirs, arguments.picture)


def published_curves() -> dict[str, dict[float, float]]:
    """estimator -> strength -> accuracy in %: from the rows that set nothing else, and read off the plot."""
    curves = defaultdict(dict, {name: dict(points) for name, points in READ_OFF.items()})
    for row in published():
        chosen = dict(word.split("=", 1) for word in row.overrides)
        if row.experiment == EXPERIMENT and chosen.keys() == {"fisher", "strategy.strength"}:
            curves[chosen["fisher"]][float(chosen["strategy.strength"])] = row.value
    return curves


def measured(folder: Path) -> dict[str, Curve]:
    """estimator -> its curve, in the order of COLOURS."""
    curves: dict[str, Curve] = {name: defaultdict(list) for name in COLOURS}
    met: set[tuple[str, float, int]] = set()
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text())
        strategy = results["config"]["strategy"]
        if display_name("strategy", strategy) != "ewc":
            continue
        estimator = display_name("fisher", strategy["fisher"])
        key = estimator, strategy["strength"], results["config"]["seed"]
        if key in met:
            raise SystemExit(f"expected one run for each seed, got a second of {' '.join(map(str, key))}: {path}")
        met.add(key)
        curve = curves.setdefault(estimator, defaultdict(list))
        curve[key[1]].append(100 * results["metrics"]["average_accuracy"])
    return {name: dict(sorted(curve.items())) for name, curve in curves.items() if curve}


def print_table(curves: dict[str, Curve], theirs: dict[str, dict[float, float]]) -> None:
    """Print mean ± standard error, with the published value, if any, in brackets."""
    strengths = sorted({strength for curve in curves.values() for strength in curve})
    print("| Fisher | " + " | ".join(f"{strength:.0e}" for strength in strengths) + " | best |")
    print("|---" * (len(strengths) + 2) + "|")
    for name, curve in curves.items():
        cells = [cell(curve.get(strength), theirs.get(name, {}).get(strength)) for strength in strengths]
        best = max(curve, key=lambda strength: statistics.mean(curve[strength]))
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.mean(curve[best]):.2f} at {best:.0e} |")
    seeds = sorted({len(values) for curve in curves.values() for values in curve.values()})
    print(f"\nSeeds a cell: {' to '.join(str(count) for count in {seeds[0]: 0, seeds[-1]: 0})}.")


def cell(values: list[float] | None, published: float | None) -> str:
    if not values:
        return "–"
    text = f"{statistics.mean(values):.2f}"
    text += f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
    return text if published is None else f"{text} ({published:g})"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def draw(curves: dict[str, Curve], theirs: dict[str, dict[float, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        colour = COLOURS.get(name)
        means = [statistics.mean(values) for values in curve.values()]
        errors = [standard_error(values) for values in curve.values()]
        axes.errorbar(list(curve), means, errors, color=colour, marker="o", capsize=3, label=name)
        line = sorted(theirs.get(name, {}).items())
        axes.plot([x for x, _ in line], [y for _, y in line], ":", color=colour, marker="o", mfc="white", alpha=0.6)
    axes.plot([], [], ":", color="grey", marker="o", mfc="white", label="published")
    axes.set(xscale="log", xlabel="strength", ylabel="final average accuracy, %", ylim=(80, 100.5))
    axes.set_title("EWC on Split MNIST: which Fisher, and how strong", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
