"""Names for people: of runs, and of the metrics that are shown in percent."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_runner.identity import EXECUTION, parts

LEFT_OUT = {"seed", "plugins", "hydra", *EXECUTION}  # not what a run is
IN_THE_NAME = {"strategy", "stream"}  # the choices; their values are for the name to say
SHARES = ("accuracy", "forgetting", "transfer", "agreement")  # how a metric's name ends, before any /scenario


def run_name(config: dict[str, Any], overrides: Sequence[str]) -> str:
    """E.g. "ewc strength=100 · split_cifar100 · s0": the strategy with what was set by hand, the stream, the seed."""
    strategy, stream, _ = parts(config)
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    strategy, stream = chosen.get("strategy", strategy), chosen.get("stream", stream)
    return " · ".join([" ".join([strategy, *_said(overrides)]), stream, f"s{config['seed']}"])


def is_share(metric: str) -> bool:
    """Whether a metric is a share of right answers, or a difference of two, and so is shown in percent."""
    return metric.partition("/")[0].endswith(SHARES)


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


def _said(overrides: Sequence[str]) -> list[str]:
    """E.g. "strength=100" for "++strategy.strength=100", "~l2" for "~strategy@strategy.parts.l2"; of several words on
    one key the last, which counts; nothing for what a name need not say."""
    last: dict[str, str] = {}
    for override in overrides:
        word, _, value = override.lstrip("+").partition("=")
        key = word.lstrip("~")
        if key not in IN_THE_NAME and not {key, key.replace("/", ".").partition(".")[0]} & LEFT_OUT:
            last.pop(key, None)
            last[key] = "~" if word.startswith("~") else f"={value}"
    ends = Counter(key.rpartition(".")[2] for key in last)
    said = []
    for key, value in last.items():
        *_, parent, end = ["", *key.split(".")]
        name = f"{parent}.{end}" if parent and ends[end] > 1 else end
        said.append(f"~{name}" if value == "~" else f"{name}{value}")
    return said
