"""What people call a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# These say where and how a run is carried out, not what it is.
LEFT_OUT = {"seed", "device", "data_root", "output_root", "rerun", "plugins", "tracker", "hydra"}
LEFT_OUT |= {"trainer.log_every", "trainer.checkpoint_every", "trainer.checkpoint_seconds", "trainer.keep_checkpoint"}
LEFT_OUT |= {"stream.download", "stream.max_device_gb"}
IN_THE_NAME = {"strategy", "stream"}  # the choices; their values are for the name to say


def parts(config: dict[str, Any]) -> tuple[str, str, str]:
    """Strategy, stream and model, e.g. ("ewc", "split_cifar100", "resnet18")."""
    strategy, stream, model = (config[part] for part in ("strategy", "stream", "model"))
    return (
        _kind(strategy),
        "_".join(filter(None, [_kind(stream), stream.get("name")])),
        str(model.get("name") or _kind(model)),
    )


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


def _kind(node: dict[str, Any]) -> str:
    return node["_target_"].rpartition(".")[2].lower()


def _shown(override: str) -> str:
    """E.g. "strength=100" for "++strategy.strength=100"; empty for what a name need not say."""
    key, _, value = override.lstrip("+").partition("=")
    if key.startswith("~") or key in IN_THE_NAME or {key, key.replace("/", ".").partition(".")[0]} & LEFT_OUT:
        return ""
    return f"{key.rpartition('.')[2]}={value}"
