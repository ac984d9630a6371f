"""The command line of a run or a sweep, as it is typed: Hydra's options, and overrides."""

from pathlib import Path

from hydra._internal.utils import get_args_parser

from cl_runner.arguments import refuse_arguments
from cl_runner.errors import ConfigError


def in_order(argv: list[str]) -> list[str]:
    """The command line with its options first, as Hydra wants them and people do not type them.

    Raises ConfigError for a word that is neither an option nor an override, and for options of Hydra's that would make
    it run another configuration than the one checked.
    """
    parser = get_args_parser()
    parser.error = lambda message: refuse_arguments(parser, "command line", message)
    arguments = parser.parse_intermixed_args(argv)
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


def added_folder(config_dir: str) -> Path:
    """The folder that adds to conf/. Raises ConfigError if it does not exist."""
    if not Path(config_dir).is_dir():
        raise ConfigError("--config-dir", f"expected a folder, got {config_dir!r}")
    return Path(config_dir)


def _at_home(word: str) -> str:
    """Expand `data_root=~/data`, which neither a shell nor Hydra does."""
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else word
