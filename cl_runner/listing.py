"""`cl-runner list`: list every choice."""

from cl_runner.arguments import Parser
from cl_runner.compose import choices
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
