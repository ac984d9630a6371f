"""What lies in a run's folder for Weights & Biases, and sending it later."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MARK = ".wandb.synced"  # wandb's own: beside a log that W&B has whole
HEADER = 7  # bytes: a log that is no longer holds nothing


def folders(run: Path, run_id: str = "*") -> list[Path]:
    """wandb's folders in a run's, in the order in which they were begun: one for each process that worked on it."""
    logs = run.resolve().glob(f"wandb/*run-*/run-{run_id}.wandb")
    return [log.parent for log in sorted((log for log in logs if log.stat().st_size > HEADER), key=_begun)]


def unsent(run: Path) -> list[Path]:
    """What to send so that W&B has the run whole: its first folder that W&B lacks, and those after it.

    What comes later has the last word on how a run ended. Of rows with one step, W&B keeps one.
    """
    every = folders(run)
    missing = [number for number, folder in enumerate(every) if not list(folder.glob(f"*{MARK}"))]
    return every[missing[0] :] if missing else []


def mark_sent(sent: Sequence[Path]) -> None:
    """Tell `wandb sync`, and `unsent`, that W&B has these."""
    for folder in sent:
        for log in folder.glob("*.wandb"):
            log.with_suffix(MARK).touch()


def send(run: Path) -> str | None:
    """Send what W&B lacks of a run. Returns what went wrong, in a line."""
    errors = [_sync(folder) for folder in unsent(run)]  # one by one: wandb keeps no order between offline and online
    return next(filter(None, errors), None)


def _sync(folder: Path) -> str | None:
    options = ["--include-online", "--include-synced"]
    command = [sys.executable, "-m", "wandb", "sync", *options, str(folder)]
    place = {**os.environ, "WANDB_DIR": str(folder.parents[1])}  # its logs: beside the run's, not wherever one stands
    said = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=place
    ).stderr.splitlines()
    errors = [line.partition("ERROR ")[2] for line in said if "ERROR " in line]
    if not errors and list(folder.glob(f"*{MARK}")):
        return None
    return errors[0] if errors else said[-1] if said else "wandb sync said nothing"


def _begun(log: Path) -> tuple[str, float]:
    """The second in its folder's name, e.g. offline-run-20261124_031325-0f3ac1, and what orders those of one second."""
    return log.parent.name.removeprefix("offline-"), log.stat().st_mtime
