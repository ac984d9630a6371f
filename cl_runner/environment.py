"""The versions and the hardware that a run's numbers were made with."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CODE = ("cl_runner", "conf", "hydra_plugins")  # where in a clone it is


def environment(device: torch.device) -> dict[str, Any]:
    """The entry of results.json and status.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "cl_runner": version("cl_runner"),
        "commit": _commit(Path(__file__).parents[1]),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def differences(earlier: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """Phrases for the code and the libraries of earlier environments that are others now, each once."""
    found = [
        f"{name} {then[name]} (now {now[name]})"
        for name in ("cl_runner", "commit", "torch")
        for then in earlier
        if then.get(name) and now[name] and then[name] != now[name]
    ]
    return list(dict.fromkeys(found))


@cache
def _commit(clone: Path) -> str | None:
    """The last commit of a clone that changed the code, with `+` and eight hex digits of what has changed since; None
    if it is no clone.

    Cached: the modules of a process are those of its start.
    """
    if not (clone / ".git").exists():  # an installed package, maybe in the environment of a project that is a clone
        return None
    try:
        commit = _git(clone, "rev-list", "-1", "HEAD", "--", *CODE).strip()
        status = _git(clone, "status", "--porcelain", "--no-renames", "-uall", "-z", "--", *CODE)
    except (OSError, subprocess.SubprocessError):  # no git, or a clone that belongs to someone else
        return None
    changed = hashlib.sha256()
    for name in sorted(entry[3:] for entry in status.split("\0") if entry):
        content = (clone / name).read_bytes() if (clone / name).is_file() else b"gone"
        changed.update(name.encode() + b"\0" + content)
    return commit + (f"+{changed.hexdigest()[:8]}" if status else "")


def _git(clone: Path, *words: str) -> str:
    command = ["git", "-C", str(clone), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout
