"""Write folders like those of finished runs."""

import json
from pathlib import Path
from typing import Any

Rows = list[list[float | None]]
STAIRS: Rows = [[0.9, None, None], [0.7, 0.8, None], [0.5, 0.6, 1.0]]


def config(strategy: str = "Finetune", seed: int = 0, lr: float = 0.1, **own: Any) -> dict[str, Any]:
    """A run's configuration; `own` are the strategy's arguments."""
    return {
        "stream": {
            "_target_": "cl_runner.streams.split.Split",
            "name": "digits",
            "scenario": "task",
            "num_tasks": 3,
            "class_order": None,
            "seed": seed,
        },
        "model": {"_target_": "cl_runner.models.MLP", "widths": [8, 8], "seed": seed},
        "strategy": {"_target_": f"cl_runner.strategies.{strategy}", **own},
        "fisher": {"_target_": "cl_runner.fisher.estimators.Probe", "seed": seed},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": lr},
        "scheduler": {"_target_": "cl_runner.schedulers.constant"},
        "trainer": {"_target_": "cl_runner.trainer.Trainer", "epochs": 1, "iterations": None, "seed": seed},
        "tracker": {"_target_": "cl_runner.trackers.base.NullTracker"},
        "seed": seed,
        "device": "cpu",
        "data_root": "data",
        "output_root": "outputs",
        "rerun": False,
        "plugins": [],
    }


def write(
    root: Path,
    settings: dict[str, Any],
    accuracy: float = 0.7,
    rows: Rows = STAIRS,
    validation: Rows | None = None,
    metrics: dict[str, float | None] | None = None,
    status: dict[str, Any] | None = None,
    name: str = "",
) -> Path:
    """Write a finished run; `accuracy` is its average, whatever its rows are."""
    strategy = settings["strategy"]["_target_"].rpartition(".")[2].lower()
    number = len(list(root.iterdir())) if root.exists() else 0
    path = root / (name or f"{strategy}-split_digits-mlp-s{settings['seed']}-{number:08x}")
    path.mkdir(parents=True)
    results = {
        "schema": 1,
        "config": settings,
        "metrics": {"average_accuracy": accuracy, "average_forgetting": 0.3, "drift_kl": None, **(metrics or {})},
        "accuracy": {"task": rows},
        "validation": {"task": validation} if validation else {},
        "seconds": {"train": 1.5, "total": 2.0},
        "peak_memory": {"train": 3_000_000},
    }
    (path / "results.json").write_text(json.dumps(results))
    (path / "status.json").write_text(json.dumps({"state": "done", "finished": float(number), **(status or {})}))
    return path


def unfinished(root: Path, name: str, **status: Any) -> Path:
    path = root / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "status.json").write_text(json.dumps(status))
    return path
