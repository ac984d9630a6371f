"""From the command line to the configurations that it asks for."""

import itertools
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cl_runner.errors import ConfigError

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
VERSION_BASE = "1.3" if hydra.__version__ < "1.4" else None


def in_order(argv: list[str]) -> list[str]:
    """The command line with its options first: Hydra wants them so, people do not.

    Raises ConfigError for an option of Hydra's that would make it run another configuration than the one checked.
    """
    arguments = get_args_parser().parse_intermixed_args(argv)
    for option in ("config_name", "config_path", "experimental_rerun"):
        if getattr(arguments, option, None):
            raise ConfigError(
                "command line", f"--{option.replace('_', '-')} is not supported; --config-dir adds to conf/"
            )
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise ConfigError("--config-dir", f"expected a folder, got {arguments.config_dir!r}")
    options = ["--multirun"] if arguments.multirun else []
    return [*options, *(["--config-dir", arguments.config_dir] if arguments.config_dir else []), *arguments.overrides]


def compose_jobs(argv: list[str]) -> list[DictConfig]:
    """Every configuration that a command line (`in_order`) asks for: one, or with -m the product of its sweeps.

    Raises ConfigError for what Hydra itself would refuse.
    """
    arguments = get_args_parser().parse_args(argv)
    search = [f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]"] if arguments.config_dir else []
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        try:
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments.overrides)
            groups = set(loader.list_groups(""))
            words = [_words(override, groups, arguments.multirun) for override in overrides]
        except HydraException as error:
            raise ConfigError("command line", _first_lines(error)) from None
        return [_composed([*search, *job]) for job in itertools.product(*words)]


def _words(override: Override, groups: set[str], multirun: bool) -> list[str]:
    """An override as the single ones that it sweeps over."""
    key = override.get_key_element()
    if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        raise ConfigError(key, "expected output_root to say where runs go: a run's folder is named by what it computes")
    if override.is_delete():
        return [key]
    if override.is_sweep_override():
        if not multirun:
            raise ConfigError(key, "a sweep over several values needs -m (--multirun)")
        values = list(override.sweep_string_iterator())
    else:
        values = [override.get_value_element_as_str()]
    # An unknown key is let in here, for the check to name it together with the nearest valid one.
    plain = not key.startswith(("+", "hydra")) and "/" not in key and key.partition("@")[0] not in groups
    return [f"{'++' if plain else ''}{key}={value}" for value in values]


def choices() -> dict[str, dict[str, str]]:
    """group -> choice -> what its YAML's first line says of it."""
    files = sorted(file for file in CONF.glob("[a-z]*/*.yaml"))
    found: dict[str, dict[str, str]] = {}
    for file in files:
        first = next((line for line in file.read_text().splitlines() if line.startswith("# ") and "@" not in line), "")
        found.setdefault(file.parent.name, {})[file.stem] = first.removeprefix("# ")
    return found


def _composed(overrides: list[str]) -> DictConfig:
    try:
        return compose("config", overrides=overrides)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
        options = ", ".join(error.options or ()) or "nothing"
        raise ConfigError(group or "command line", f"expected one of {options}, got {choice!r}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError("command line", _first_lines(error)) from None


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])
