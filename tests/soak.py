"""Kill runs at random moments, and check that they end as if they had not been killed.

For every strategy one run is left alone, and its twins are killed (SIGKILL) again and again, whatever they are doing,
and restarted; then weights, matrices, metrics and journals are compared bit for bit. Processes are forked from one that
has imported everything, which saves each of them four seconds, but has not trained anything itself.

    python tests/soak.py --kills 100 [--strategies ewc,lwf] [--seed 0]
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from cl_runner.compose import compose_jobs
from cl_runner.config import check, validated
from cl_runner.folder import RunFolder
from cl_runner.identity import run_folder
from cl_runner.job import carry_out
from cl_runner.listing import choices
from cl_runner.trackers.journal import draw_accuracy
from tests.test_resume import overrides_for, without_timing

MOST_KILLS = 6  # of one run
SETTINGS = ["trainer.checkpoint_every=2", "trainer.log_every=3", "stream.validation=0.2"]


class UnaskedEndError(Exception):
    """A run failed without having been killed."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=sorted(choices()["strategy"]))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    shares = [
        len(range(number, arguments.kills, len(arguments.strategies))) for number in range(len(arguments.strategies))
    ]
    total, unequal, since = 0, [], time.monotonic()
    print(f"{'strategy':<14}{'kills':>6}{'runs':>6}  equal", flush=True)
    with tempfile.TemporaryDirectory() as root:
        import_everything(Path(root))
        weights = pretrained(Path(root))
        for strategy, share in zip(arguments.strategies, shares, strict=True):
            try:
                kills, runs, differences = soak(strategy, share, weights, Path(root) / strategy)
            except UnaskedEndError as error:
                kills, runs, differences = 0, 0, [str(error)]
            print(f"{strategy:<14}{kills:>6}{runs:>6}  {differences or 'yes'}", flush=True)
            total += kills
            unequal += [strategy] if differences else []
    seconds = time.monotonic() - since
    print(
        f"{total} kills in {seconds:.0f} s; {'all runs' if not unequal else 'all but those of ' + ', '.join(unequal)} "
        "ended as if they had not been killed"
    )
    return int(bool(unequal))


def import_everything(root: Path) -> None:
    """Import what is otherwise imported on demand: for data sets, optimizers and pictures."""
    check(configuration("finetune", None, root))
    nothing = dict.fromkeys(("average_accuracy", "average_forgetting"))
    draw_accuracy(root / "nothing.png", {"accuracy": {"task": [[None]]}, "metrics": nothing}, "task", "nothing")


def pretrained(root: Path) -> Path:
    """Weights with a head, for strategies that use the pretrained model too."""
    cfg = configuration("finetune", None, root / "pretrained")
    finished(begun(cfg, root / "log"), root / "log")
    return folder_of(cfg) / "model.safetensors"


def soak(strategy: str, share: int, weights: Path, root: Path) -> tuple[int, int, list[str]]:
    """Kill a strategy's runs at least `share` times. Returns the number of kills and of runs, and what differed."""
    root.mkdir()
    whole = configuration(strategy, weights, root / "whole")
    since = time.monotonic()
    finished(begun(whole, root / "log"), root / "log")
    seconds = time.monotonic() - since
    kills, runs, differences = 0, 0, []
    while kills < share:
        runs += 1
        killed = configuration(strategy, weights, root / f"killed{runs}")
        for _ in range(random.randint(1, min(MOST_KILLS, share - kills))):
            process = begun(killed, root / "log")
            time.sleep(random.uniform(0, seconds))
            os.kill(process, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        finished(begun(killed, root / "log"), root / "log")
        differences += compared(folder_of(whole), folder_of(killed))
    return kills, runs, differences


def configuration(strategy: str, weights: Path | None, root: Path) -> DictConfig:
    settings = [*overrides_for(strategy, weights), *SETTINGS, f"output_root={root}"]
    (cfg,) = compose_jobs(settings)
    return cfg


def begun(cfg: DictConfig, log: Path) -> int:
    """Start a process that carries out the configuration. Returns its id."""
    if process := os.fork():
        return process
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        carry_out(check(cfg))
        status = 0
    except Exception:
        traceback.print_exc()  # its last line is what `finished` says
    finally:
        os._exit(status)


def finished(process: int, log: Path) -> None:
    _, status = os.waitpid(process, 0)
    if status != 0:
        *_, last = log.read_text().splitlines() or [""]
        raise UnaskedEndError(f"a run that nobody killed ended: {last}")


def folder_of(cfg: DictConfig) -> Path:
    return run_folder(validated(cfg))


def compared(one: Path, other: Path) -> list[str]:
    """The parts in which two runs differ."""
    views: dict[str, Callable[[Path], Any]] = {
        "state": lambda path: RunFolder(path).state,
        "weights": lambda path: {name: value.tolist() for name, value in load_file(path / "model.safetensors").items()},
        "results": lambda path: {
            name: value
            for name, value in json.loads((path / "results.json").read_text()).items()
            if name in ("accuracy", "validation", "zero_shot", "metrics")
        },
        "journal": without_timing,
        "files": lambda path: sorted(file.name for file in path.iterdir()),
    }
    return [name for name, view in views.items() if view(one) != view(other)]


if __name__ == "__main__":
    sys.exit(main())
