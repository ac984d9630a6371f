"""EWC's accuracy over its strength, a curve a Fisher estimator, beside the published one: tables and a picture.

    python benchmarks/strength.py OUTPUTS [--picture benchmarks/strength.png]

OUTPUTS holds runs of `experiment=vandeven_fisher_mnist` (its header says how to make them), those of strategy=finetune
standing for no Fisher. Published values: G. van de Ven, "On the computation of the Fisher information in continual
learning", 2025, https://arxiv.org/abs/2502.11756, Split MNIST, 30 seeds; most of them read off the plot, to 0.2. A
measured value passes within 2·sqrt(SEM² + SD²/n) of it, SEM published (or 0.2) and SD ours, at least 0.5.
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

# estimator -> strength -> final accuracy in %
PUBLISHED = {
    "exact": {1e2: 91.7, 1e3: 96.8, 1e4: 99.0, 1e5: 99.1, 1e8: 98.9},
    "sampled": {1e4: 86.9, 1e8: 99.2},
    "empirical": {1e3: 85.2, 1e4: 87.1, 1e5: 91.9, 1e6: 95.9, 1e7: 97.9, 1e8: 99.1, 1e9: 99.12},
    "batched": {1e4: 84.6, 1e6: 86.9, 1e7: 91.2, 1e8: 95.1, 1e9: 97.9, 1e10: 99.0, 1e11: 99.11},
}
NONE = 85.41  # without a Fisher
SEM = {("none", 0.0): 0.88, ("empirical", 1e9): 0.12, ("batched", 1e11): 0.16}  # published standard errors
READ = 0.2  # what stands for one where a value was read off the plot
LEAST = 0.5  # tolerance
# Okabe & Ito's, which the colour-blind tell apart too.
COLOURS = {"exact": "#000000", "probe": "#D55E00", "sampled": "#009E73", "empirical": "#0072B2", "batched": "#CC79A7"}

Curve = dict[float, list[float]]  # strength -> accuracy in % of every seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, help="where to write the picture (PNG)")
    arguments = parser.parse_args()
    found = measured(arguments.folder)
    curves = {name: curve for name, curve in found.items() if name != "none"}
    if not curves:
        raise SystemExit(f"expected a folder of finished runs of strategy=ewc, got {arguments.folder}")
    print_table(curves)
    print_verdicts(found)
    if arguments.picture:
        draw(curves, arguments.picture)


def measured(folder: Path) -> dict[str, Curve]:
    """estimator -> its curve, in the order of COLOURS; `none`, of strength 0, is no Fisher."""
    curves: dict[str, Curve] = {name: defaultdict(list) for name in COLOURS}
    met: set[tuple[str, float, int]] = set()
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text())
        strategy = results["config"]["strategy"]
        kind = strategy["_target_"].rpartition(".")[2]
        if kind not in ("EWC", "Finetune"):
            continue
        estimator = strategy["fisher"]["_target_"].rpartition(".")[2].lower() if kind == "EWC" else "none"
        key = estimator, strategy.get("strength", 0.0), results["config"]["seed"]
        if key in met:
            raise SystemExit(f"expected one run for each seed, got a second of {' '.join(map(str, key))}: {path}")
        met.add(key)
        curve = curves.setdefault(estimator, defaultdict(list))
        curve[key[1]].append(100 * results["metrics"]["average_accuracy"])
    return {name: dict(sorted(curve.items())) for name, curve in curves.items() if curve}


def print_table(curves: dict[str, Curve]) -> None:
    """Mean ± standard error; what was published, where it was, in brackets."""
    strengths = sorted({strength for curve in curves.values() for strength in curve})
    print("| Fisher | " + " | ".join(f"{strength:.0e}" for strength in strengths) + " | best |")
    print("|---" * (len(strengths) + 2) + "|")
    for name, curve in curves.items():
        cells = [cell(curve.get(strength), PUBLISHED.get(name, {}).get(strength)) for strength in strengths]
        best = max(curve, key=lambda strength: statistics.mean(curve[strength]))
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.mean(curve[best]):.2f} at {best:.0e} |")
    seeds = sorted({len(values) for curve in curves.values() for values in curve.values()})
    print(f"\nSeeds a cell: {' to '.join(str(count) for count in {seeds[0]: 0, seeds[-1]: 0})}.")


def print_verdicts(curves: dict[str, Curve]) -> None:
    """What was published beside what was measured, where both are there."""
    print("\n| Fisher | strength | measured | SD | published | tolerance | verdict |")
    print("|---" * 7 + "|")
    for name, published in {"none": {0.0: NONE}, **PUBLISHED}.items():
        for strength, expected in published.items():
            values = curves.get(name, {}).get(strength, [])
            if len(values) < 2:
                continue
            sem = SEM.get((name, strength))
            tolerance = max(LEAST, 2 * math.hypot(READ if sem is None else sem, standard_error(values)))
            verdict = "pass" if abs(statistics.mean(values) - expected) <= tolerance else "miss"
            held = "–" if name == "none" else f"{strength:.0e}"
            given = f"{expected:g}" if sem is None else f"{expected:g} ± {sem:g}"
            spread = f"{statistics.stdev(values):.2f}"
            print(f"| {name} | {held} | {cell(values, None)} | {spread} | {given} | {tolerance:.1f} | {verdict} |")


def cell(values: list[float] | None, published: float | None) -> str:
    if not values:
        return "–"
    text = f"{statistics.mean(values):.2f}"
    text += f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
    return text if published is None else f"{text} ({published:g})"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def draw(curves: dict[str, Curve], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        colour = COLOURS.get(name)
        means = [statistics.mean(values) for values in curve.values()]
        errors = [standard_error(values) for values in curve.values()]
        axes.errorbar(list(curve), means, errors, color=colour, marker="o", capsize=3, label=name)
        published = PUBLISHED.get(name, {})
        axes.plot(list(published), list(published.values()), ":", color=colour, marker="o", mfc="white", alpha=0.6)
    axes.plot([], [], ":", color="grey", marker="o", mfc="white", label="published")
    axes.set(xscale="log", xlabel="strength", ylabel="final average accuracy, %", ylim=(80, 100.5))
    axes.set_title("EWC on Split MNIST: which Fisher, and how strong", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
