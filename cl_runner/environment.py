"""The versions and the hardware that a run's numbers were made with."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """The entry of results.json and status.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "cl_runner": version("cl_runner"),
        "commit": _commit(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


@cache
def _commit(clone: Path) -> str | None:
    """The commit of a clone, with `+` and eight hex digits of what has changed in the code since; None if it is none.

    Cached: the modules of a process are those of its start.
    """
    if not (clone / ".git").exists():  # an installed package, maybe in the environment of a project that is a clone
        return None
    try:
        head = _git(clone, "rev-parse", "HEAD").decode().strip()
        changes = _git(clone, "diff", "HEAD", "--", "cl_runner", "conf", "hydra_plugins")
    except (OSError, subprocess.SubprocessError):  # no git, or a clone that belongs to someone else
        return None
    return head + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def _git(clone: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(clone), *words], capture_output=True, check=True, timeout=10).stdout
