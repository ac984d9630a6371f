"""What people call a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_runner.identity import CONDUCT, parts

LEFT_OUT = {"seed", "plugins", "hydra", *CONDUCT}  # not what a run is
IN_THE_NAME = {"strategy", "stream"}  # the choices; their values are for the name to say


def run_name(config: dict[str, Any], overrides: Sequence[str]) -> str:
    """E.g. "ewc strength=100 · split_cifar100 · s0": the strategy with what was set by hand, the stream, the seed."""
    strategy, stream, _ = parts(config)
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    strategy, stream = chosen.get("strategy", strategy), chosen.get("stream", stream)
    said = filter(None, map(_shown, overrides))
    return " · ".join([" ".join([strategy, *said]), stream, f"s{config['seed']}"])


def overrides_of(run: Path) -> list[str]:
    """What was set on the command line for this run, as Hydra left it in the run's folder."""
    path = run / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or [] if path.exists() else []


def command_of(run: Path, argv: Sequence[str]) -> str:
    """What makes this run alone: the command line `argv` of the process, of a sweep its own job's."""
    words = list(argv)
    if "--multirun" in words:
        place = words.index("--config-dir") if "--config-dir" in words else len(words)
        words = [*words[place : place + 2], *overrides_of(run)]
    return shlex.join(["cl-runner", *words])


def _shown(override: str) -> str:
    """E.g. "strength=100" for "++strategy.strength=100"; empty for what a name need not say."""
    key, _, value = override.lstrip("+").partition("=")
    if key.startswith("~") or key in IN_THE_NAME or {key, key.replace("/", ".").partition(".")[0]} & LEFT_OUT:
        return ""
    return f"{key.rpartition('.')[2]}={value}"
