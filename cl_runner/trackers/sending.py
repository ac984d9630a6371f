"""The W&B logs in a run's folder, and uploading them later."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MARK = ".wandb.synced"  # wandb's own mark, beside a log that has been uploaded completely
HEADER = 7  # bytes: a log no longer than this is empty


def folders(run: Path, run_id: str = "*") -> list[Path]:
    """wandb's folders in a run's folder, oldest first: one for each process that worked on the run."""
    logs = run.resolve().glob(f"wandb/*run-*/run-{run_id}.wandb")
    return [log.parent for log in sorted((log for log in logs if log.stat().st_size > HEADER), key=_begun)]


def unsent(run: Path) -> list[Path]:
    """The folders to upload to complete the run on W&B: the first that W&B lacks, and all after it.

    The last upload decides how the run appears to have ended. Of several rows with the same step, W&B keeps one.
    """
    every = folders(run)
    missing = [number for number, folder in enumerate(every) if not list(folder.glob(f"*{MARK}"))]
    return every[missing[0] :] if missing else []


def mark_sent(sent: Sequence[Path]) -> None:
    """Mark folders as uploaded, for `wandb sync` and `unsent`."""
    for folder in sent:
        for log in folder.glob("*.wandb"):
            log.with_suffix(MARK).touch()


def send(run: Path) -> str | None:
    """Upload what W&B lacks of a run. Returns what went wrong, in one line, or None."""
    errors = [_sync(folder) for folder in unsent(run)]  # one by one: wandb does not keep offline and online in order
    return next(filter(None, errors), None)


def _sync(folder: Path) -> str | None:
    options = ["--include-online", "--include-synced"]
    command = [sys.executable, "-m", "wandb", "sync", *options, str(folder)]
    place = {**os.environ, "WANDB_DIR": str(folder.parents[1])}  # puts its logs beside the run's
    said = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=place
    ).stderr.splitlines()
    errors = [line.partition("ERROR ")[2] for line in said if "ERROR " in line]
    if not errors and list(folder.glob(f"*{MARK}")):
        return None
    return errors[0] if errors else said[-1] if said else "wandb sync said nothing"


def _begun(log: Path) -> tuple[str, float]:
    """A sort key: the time in the folder's name, e.g. offline-run-20261124_031325-0f3ac1, then that of the file."""
    return log.parent.name.removeprefix("offline-"), log.stat().st_mtime
