"""Measure how long `cl-runner report` takes over many made-up runs.

    python benchmarks/report.py [--runs 2000] [--tasks 10] [--keep FOLDER]

Folders hold the text files that a finished run leaves (status.json, results.json, config.yaml, a journal of a few
rows), in groups of five seeds: strategies, strengths, learning rates. The report runs in a process of its own, and
its imports are timed too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = 5
STRATEGIES = {"finetune": 0.0, "l2": 0.5, "ewc": 0.8, "lwf": 0.7}  # how much of what was learned each keeps
STRENGTHS = [10.0**power for power in range(-3, 7)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="make the runs there and leave them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        make_runs(folder, arguments.runs, arguments.tasks)
        command = [sys.executable, "-m", "cl_runner", "report", str(folder), "--curve", "strategy.strength"]
        command += ["--baseline", "finetune"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = (folder / "report" / "index.html").stat().st_size / 1e6
        cpu = used.ru_utime + used.ru_stime
        print(f"{arguments.runs} runs of {arguments.tasks} tasks: {seconds:.1f} s ({cpu:.1f} s of CPU), {size:.2f} MB")


def make_runs(folder: Path, runs: int, tasks: int) -> None:
    """Make `runs` runs: every strategy at one learning rate after another."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    methods = [("finetune", None), *((name, strength) for name in list(STRATEGIES)[1:] for strength in STRENGTHS)]
    for number in range(runs):
        group, seed = divmod(number, SEEDS)
        round_, method = divmod(group, len(methods))
        strategy, strength = methods[method]
        lr = (1, 2, 5)[round_ % 3] * 10.0 ** (round_ // 3 - 4)
        config = make_config(strategy, strength, lr, seed, tasks)
        write_run(folder / f"{strategy}-split_made_up-mlp-s{seed}-{number:08x}", config, strategy, random)


def make_config(strategy: str, strength: float | None, lr: float, seed: int, tasks: int) -> dict[str, Any]:
    stream = {"_target_": "cl_runner.streams.split.Split", "name": "made_up", "scenario": "task", "seed": seed}
    own = {} if strength is None else {"strength": strength, "anchor": "previous"}
    return {
        "stream": {**stream, "num_tasks": tasks},
        "model": {"_target_": "cl_runner.models.MLP", "widths": [400, 400], "seed": seed},
        "strategy": {"_target_": f"cl_runner.strategies.{strategy.upper()}", **own},
        "fisher": {"_target_": "cl_runner.fisher.estimators.Probe", "draws": 1, "seed": seed},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr, "weight_decay": 0.0},
        "scheduler": {"_target_": "cl_runner.schedulers.constant"},
        "trainer": {"_target_": "cl_runner.trainer.Trainer", "epochs": 5, "iterations": None, "seed": seed},
        "tracker": {"_target_": "cl_runner.trackers.base.NullTracker"},
        "seed": seed,
        "device": "cpu",
        "data_root": "data",
        "output_root": "outputs",
        "rerun": False,
        "plugins": [],
    }


def write_run(path: Path, config: dict[str, Any], strategy: str, random: np.random.Generator) -> None:
    """Write a finished run's files, with accuracies that fall with every task, less for strategies that keep more."""
    tasks = config["stream"]["num_tasks"]
    strength = config["strategy"].get("strength", 0.0)
    kept = STRATEGIES[strategy] * np.exp(-((np.log10(max(strength, 1e-9)) - 2) ** 2) / 18)
    age = np.arange(tasks)[:, None] - np.arange(tasks)[None]
    learned = 0.97 - 0.1 * kept * np.arange(tasks) / tasks
    accuracy = 0.5 + (learned - 0.5) * (kept + (1 - kept) * np.exp(-age / 4))
    accuracy = np.clip(accuracy + 0.02 * random.standard_normal(accuracy.shape), 0, 1)
    rows = {name: lower(accuracy * share) for name, share in (("task", 1.0), ("class", 0.6))}
    best = np.where(np.tri(tasks, dtype=bool), accuracy, -np.inf)[:-1].max(0)
    metrics = {
        "average_accuracy": float(accuracy[-1].mean()),
        "average_forgetting": float((best - accuracy[-1])[:-1].mean()),
        "learning_accuracy": float(accuracy.diagonal().mean()),
        "validation_accuracy": float(accuracy[-1].mean() + 0.005 * random.standard_normal()),
    }
    results = {
        "schema": 1,
        "config": config,
        "environment": {"cl_runner": "0.1.0"},
        "metrics": metrics,
        "accuracy": rows,
        "validation": {"task": rows["task"]},
        "zero_shot": {},
        "seconds": {"train": 60.0, "total": float(60 + 5 * random.standard_normal())},
        "peak_memory": {"train": 900_000_000},
    }
    path.mkdir(exist_ok=True)
    (path / "results.json").write_text(json.dumps(results, indent=2))
    (path / "status.json").write_text(json.dumps({"state": "done", "finished": 1.0, "tasks": tasks}))
    (path / "config.yaml").write_text(json.dumps(config))
    (path / "steps.jsonl").write_text('{"kind": "task"}\n' * tasks)


def lower(matrix: np.ndarray) -> list[list[float | None]]:
    """The rows as in results.json, with null for tasks not learned yet."""
    return [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(matrix.tolist())]


if __name__ == "__main__":
    main()
