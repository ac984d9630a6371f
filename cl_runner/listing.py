"""`cl-runner list`: list every choice."""

from cl_runner import CONF
from cl_runner.arguments import Parser
from cl_runner.command_line import added_folder
from cl_runner.errors import ConfigError, hint


def main(argv: list[str]) -> int:
    """Print every choice of every group, or of those named, one per line. Returns the exit status.

    Raises ConfigError for an unknown group or a --config-dir that is not a folder.
    """
    asked = parser().parse_args(argv)
    found = choices(asked.config_dir)
    for group in asked.groups:
        if group not in found:
            raise ConfigError("list", f"expected a group, got {group!r}; {hint(group, found)}")
    groups = asked.groups or list(found)
    longest = max(len(choice) for group in groups for choice in found[group])
    for group in groups:
        print(f"{group}=")
        for choice, says in found[group].items():
            print(f"  {choice:<{longest}}  {says}")
    return 0


def parser() -> Parser:
    parser = Parser(prog="cl-runner list", description="List every choice, one per line.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="e.g. strategy fisher; none: all")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="your own folder that adds to conf/")
    return parser


def choices(config_dir: str | None = None) -> dict[str, dict[str, str]]:
    """group -> choice -> the description in its YAML's first line; including those of --config-dir.

    Raises ConfigError if that is not a folder.
    """
    found: dict[str, dict[str, str]] = {}
    for root in (CONF, *([added_folder(config_dir)] if config_dir else [])):
        for file in sorted([*root.glob("[a-z]*/*.yaml"), *root.glob("hydra/*/*.yaml")]):
            lines = file.read_text().splitlines()
            first = next((line for line in lines if line.startswith("# ") and "@" not in line), "")
            group = found.setdefault(str(file.parent.relative_to(root)), {})
            group.setdefault(file.stem, first.removeprefix("# "))  # where names clash, Hydra takes the one in conf/
    found["hydra/launcher"]["basic"] = "One job after another, in this process: the default, of Hydra itself"
    return found
