"""The command line of a run or a sweep, as it is typed: Hydra's options, and overrides."""

from collections.abc import Iterable
from pathlib import Path

from hydra._internal.utils import get_args_parser

from cl_runner.arguments import refuse_arguments
from cl_runner.errors import ConfigError, did_you_mean

DRY_RUN = "--dry-run"


def in_order(argv: list[str]) -> list[str]:
    """The command line with its options first, as Hydra wants them and people do not type them.

    Raises ConfigError for a word that is neither an option nor an override, for settings with dashes, for --dry-run
    (where it belongs, `without_dry_run` has removed it), and for options of Hydra's that would make it run another
    configuration than the one checked.
    """
    parser = get_args_parser()
    parser.add_argument(DRY_RUN, action="store_true")
    parser.error = lambda message: refuse_arguments(parser, "command line", message)
    for word in argv:
        _refuse_dashes(word, parser._option_string_actions)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.dry_run:
        raise ConfigError("command line", f"expected {DRY_RUN} beside what is to be run, not where it is only shown")
    arguments.overrides = [_at_home(word) for word in arguments.overrides]
    for word in arguments.overrides:
        key, equals, _ = word.partition("=")
        if not key.strip("+~") or not (equals or key.startswith("~")):
            raise ConfigError("command line", f"expected KEY=VALUE, or a command as the first word, got {word!r}")
    for option in ("config_name", "config_path", "experimental_rerun"):
        if getattr(arguments, option, None):
            raise ConfigError(
                "command line", f"--{option.replace('_', '-')} is not supported; --config-dir adds to conf/"
            )
    if arguments.config_dir:
        added_folder(arguments.config_dir)
    options = ["--multirun"] if arguments.multirun else []
    return [*options, *(["--config-dir", arguments.config_dir] if arguments.config_dir else []), *arguments.overrides]


def without_dry_run(argv: list[str]) -> list[str]:
    """The command line without --dry-run, which may be abbreviated as options may."""
    return [word for word in argv if not (word.startswith("--d") and DRY_RUN.startswith(word))]


def _refuse_dashes(word: str, options: Iterable[str]) -> None:
    """Refuse a setting that is given as an option: `--seed=3`, `-seed=3` or `--seed 3`."""
    option, equals, value = word.partition("=")
    meant = option.startswith("--") or (option.startswith("-") and equals)
    if meant and option not in options and not did_you_mean(option, options, cutoff=0.85):
        key = option.lstrip("-").replace("-", "_")
        raise ConfigError("command line", f"expected {key}={value or '…'}, without dashes, got {word}")


def added_folder(config_dir: str) -> Path:
    """The folder that adds to conf/. Raises ConfigError if it does not exist."""
    if not Path(config_dir).is_dir():
        raise ConfigError("--config-dir", f"expected a folder, got {config_dir!r}")
    return Path(config_dir)


def _at_home(word: str) -> str:
    """Expand `data_root=~/data`, which neither a shell nor Hydra does."""
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else word
