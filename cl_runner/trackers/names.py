"""Names for people: of runs, and of the metrics that are shown in percent."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_runner.identity import EXECUTION, parts

HOW = {"hydra", *EXECUTION}  # they say how a run is carried out
UNSAID = {"strategy", "stream", "seed", "plugins"}  # a name shows them anyway, or need not
SHARES = ("accuracy", "forgetting", "transfer", "agreement")  # how a metric's name ends, before any /scenario


def run_name(config: dict[str, Any], overrides: Sequence[str]) -> str:
    """E.g. "ewc strength=100 · split_cifar100 · s0": the strategy with the overrides, the stream, the seed."""
    strategy, stream, _ = parts(config)
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    strategy, stream = chosen.get("strategy", strategy), chosen.get("stream", stream)
    return " · ".join([" ".join([strategy, *_said(overrides)]), stream, f"s{config['seed']}"])


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers, or a difference of two, and so is shown in percent."""
    return metric.partition("/")[0].endswith(SHARES)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as people read it, without the unit; a dash for None."""
    # Adding zero turns minus zero into zero.
    return "–" if share is None else f"{round(100 * share, digits) + 0.0:.{digits}f}".replace("-", "−")


def says_how(override: str) -> bool:
    """Whether an override only says how a run is carried out, not what it computes."""
    key = override.lstrip("+~").partition("=")[0]
    return bool({key, key.replace("/", ".").partition(".")[0]} & HOW)


def overrides_of(run: Path) -> list[str]:
    """This run's overrides, as Hydra recorded them in the run's folder."""
    path = run / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or [] if path.exists() else []


def command_of(run: Path, command: str) -> str:
    """The command that makes or resumes this run alone, given the one that asked for it: for a sweep, that of the run's
    own job. Without `rerun=true`, which would start over.

    Empty if none did.
    """
    if not command:
        return ""
    words = shlex.split(command)[1:]
    if "--multirun" in words:
        place = words.index("--config-dir") if "--config-dir" in words else len(words)
        words = [*words[place : place + 2], *overrides_of(run)]
    return shlex.join(["cl-runner", *(word for word in words if word.lstrip("+").lower() != "rerun=true")])


def _said(overrides: Sequence[str]) -> list[str]:
    """E.g. "strength=100" for "++strategy.strength=100", "~l2" for "~strategy@strategy.parts.l2".

    Of several overrides of one key the last counts; those that a name need not show are left out.
    """
    last: dict[str, str] = {}
    for override in overrides:
        word, _, value = override.lstrip("+").partition("=")
        key = word.lstrip("~")
        if key not in UNSAID and not says_how(override):
            last.pop(key, None)
            last[key] = "~" if word.startswith("~") else f"={value}"
    ends = Counter(key.rpartition(".")[2] for key in last)
    said = []
    for key, value in last.items():
        *_, parent, end = ["", *key.split(".")]
        name = f"{parent}.{end}" if parent and ends[end] > 1 else end
        said.append(f"~{name}" if value == "~" else f"{name}{value}")
    return said
