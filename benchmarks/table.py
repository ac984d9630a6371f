"""Finished runs as a Markdown table: mean ± standard deviation over seeds.

    python benchmarks/table.py OUTPUTS [--by strategy.strength fisher] [--metrics average_accuracy drift_kl]

Runs whose configurations differ only in the seed are one row. `--by` adds columns that tell rows of one strategy apart.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

PERCENT = ("accuracy", "forgetting", "transfer", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--by", nargs="*", default=[], help="keys of the configuration, e.g. strategy.strength")
    parser.add_argument("--metrics", nargs="*", default=["average_accuracy", "average_forgetting", "drift_kl"])
    arguments = parser.parse_args()
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(arguments.folder.glob("*/results.json")):
        if path.parent.suffix[1:].isdigit():  # an earlier run, moved aside by rerun=true
            continue
        results = json.loads(path.read_text())
        known = results["metrics"].keys()
        if unknown := [metric for metric in arguments.metrics if metric not in known]:
            raise SystemExit(f"--metrics: expected some of {', '.join(sorted(known))}; got {unknown[0]!r}")
        groups[tuple(look_up(results["config"], key) for key in ("strategy", *arguments.by))].append(results)
    if not groups:
        raise SystemExit(f"expected a folder of finished runs, got {arguments.folder}")
    print("| " + " | ".join(["strategy", *arguments.by, *arguments.metrics, "seconds", "n"]) + " |")
    print("|---" * (len(arguments.by) + len(arguments.metrics) + 3) + "|")
    for key, runs in sorted(groups.items()):
        check_seeds(key, runs)
        cells = [summary([run["metrics"].get(metric) for run in runs], metric) for metric in arguments.metrics]
        seconds = statistics.mean(run["seconds"]["total"] for run in runs)
        print("| " + " | ".join([*key, *cells, f"{seconds:.0f}", str(len(runs))]) + " |")


def look_up(config: dict[str, Any], key: str) -> str:
    """A value of the configuration, or a component's name."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, "-") if isinstance(value, dict) else "-"
    if isinstance(value, dict):
        return value["_target_"].rpartition(".")[2].lower()
    return "null" if value is None else str(value)


def check_seeds(key: tuple[str, ...], runs: list[dict[str, Any]]) -> None:
    seeds = [run["config"]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{' '.join(key)}: seeds {seeds} are not all different; tell the rows apart with --by")


def summary(values: list[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    scale, digits = (100, 1) if any(word in metric for word in PERCENT) else (1, 2)
    mean = f"{scale * statistics.mean(known):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


if __name__ == "__main__":
    main()
