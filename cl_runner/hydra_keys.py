"""Keys that nobody may set, and those that Hydra's own configuration (`hydra.…`) does not have."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from yaml import safe_load

from cl_runner import CONF
from cl_runner.errors import ConfigError, hint, suggestion

_FOLDERS = "expected output_root to say where runs go: a run's folder is named by what it computes"
_LOGGING = "it cannot be set: the terminal shows records from INFO up, and run.log in the run's folder all of them"
RESERVED = {
    **dict.fromkeys(("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"), _FOLDERS),
    **dict.fromkeys(("hydra.verbose", "hydra/job_logging", "hydra/hydra_logging"), _LOGGING),
    **dict.fromkeys(("hydra.job_logging", "hydra.hydra_logging"), _LOGGING),
    "hydra.output_subdir": "it cannot be set: .hydra in a run's folder holds what was asked for",
    "hydra.mode": "expected -m (--multirun), which says the same",
    "hydra.searchpath": "expected --config-dir DIR, for one folder of choices of your own",
    "hydra.job.chdir": "it cannot be set: paths are relative to the directory that the command is given in",
    "dry_run": "expected the option --dry-run",
    "_pair": "it cannot be chosen: it follows from stream and model",
    "protocol": "it cannot be chosen: it follows from experiment and strategy",
}
# Mappings of Hydra's own that take any key.
OPEN = ("hydra.sweeper.params", "hydra.callbacks", "hydra.job.env_set")


def refuse_unknown_keys(keys: Iterable[str], hydra: Any) -> None:
    """Refuse keys that Hydra's own configuration lacks: Hydra would advise a +, and then do nothing with them.

    `hydra`: that configuration, in plain containers. Raises ConfigError.
    """
    for key in keys:
        node: Any = {"hydra": hydra}
        path = ""
        for part in key.split("."):
            if path in OPEN or not isinstance(node, dict):
                break
            if part not in node:
                raise ConfigError(key, f"unknown key; {_hint(path, part, [str(known) for known in node])}")
            node, path = node[part], f"{path}.{part}".removeprefix(".")


def _hint(path: str, key: str, known: list[str]) -> str:
    """A hint for a key that is unknown below `path`: another choice of a launcher or a sweeper may have it."""
    group = path.replace(".", "/")
    having: dict[str, list[str]] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        for other in safe_load(file.read_text()):
            having.setdefault(other, []).append(file.stem)
    for near in get_close_matches(key, [*known, *having], n=1):
        return suggestion([near if near in known else f"{near} of {group}={' or '.join(having[near])}"])
    return hint(key, known)
