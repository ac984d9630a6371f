"""`cl-runner list`: list every choice, or one choice's keys with what they mean."""

from pathlib import Path

from cl_runner import CONF
from cl_runner.arguments import Parser
from cl_runner.command_line import added_folder
from cl_runner.errors import ConfigError, hint


def main(argv: list[str]) -> int:
    """Print every choice of every group, or of those named, one per line, or the YAML of the choices named. Returns the
    exit status.

    Raises ConfigError for an unknown group or choice, or a --config-dir that is not a folder.
    """
    asked = parser().parse_args(argv)
    files = _files(asked.config_dir)
    found = choices(asked.config_dir)
    named = [name.partition("=") for name in asked.names]
    for group, equals, choice in named:
        if group not in found:
            raise ConfigError("list", f"expected a group, got {group!r}; {hint(group, found)}")
        if equals and choice not in found[group]:
            raise ConfigError("list", f"expected a choice of {group}, got {choice!r}; {hint(choice, found[group])}")
    groups = [group for group, equals, _ in named if not equals] or ([] if named else list(found))
    longest = max((len(choice) for group in groups for choice in found[group]), default=0)
    for group in groups:
        print(f"{group}=")
        for choice, says in found[group].items():
            print(f"  {choice:<{longest}}  {says}")
    for group, equals, choice in named:
        if equals:
            file = files[group].get(choice)  # Hydra's own have none here
            print(f"{group}={choice}\n{file.read_text().strip() if file else f'# {found[group][choice]}'}")
    return 0


def parser() -> Parser:
    parser = Parser(prog="cl-runner list", description="List every choice, one per line, or show one with its keys.")
    says = "e.g. strategy fisher: their choices; strategy=ewc: its keys, with what they mean; none: all choices"
    parser.add_argument("names", nargs="*", metavar="GROUP[=CHOICE]", help=says)
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="your own folder that adds to conf/")
    return parser


def choices(config_dir: str | None = None) -> dict[str, dict[str, str]]:
    """group -> choice -> the description in its YAML's first line; including those of --config-dir.

    Raises ConfigError if that is not a folder.
    """
    found = {group: {name: _says(file) for name, file in own.items()} for group, own in _files(config_dir).items()}
    found["hydra/launcher"]["basic"] = "One job after another, in this process: the default, of Hydra itself"
    return found


def _files(config_dir: str | None) -> dict[str, dict[str, Path]]:
    """group -> choice -> its YAML. Raises as `choices`."""
    files: dict[str, dict[str, Path]] = {}
    for root in (CONF, *([added_folder(config_dir)] if config_dir else [])):
        for file in sorted([*root.glob("[a-z]*/*.yaml"), *root.glob("hydra/*/*.yaml")]):
            group = files.setdefault(str(file.parent.relative_to(root)), {})
            group.setdefault(file.stem, file)  # where names clash, Hydra takes the one in conf/
    return files


def _says(file: Path) -> str:
    lines = file.read_text().splitlines()
    return next((line for line in lines if line.startswith("# ") and "@" not in line), "").removeprefix("# ")
