"""The command line: who answers it."""

import sys
from importlib import import_module

from cl_runner import __version__
from cl_runner.errors import ConfigError

# These only print something about the configuration: Hydra answers them, and torch is never imported.
ASKS_HYDRA = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}

# Commands of their own: main(argv) -> exit status, and parser(). Torch is imported only where something is to be run.
COMMANDS = {
    "status": "cl_runner.report.status",
    "report": "cl_runner.report.command",
    "sync": "cl_runner.report.sync",
    "dashboard": "cl_runner.report.dashboard",
    "verify": "cl_runner.verify",
}


def main() -> None:
    """What the `cl-runner` script runs.

    Exit status: 0 done, 1 a run failed, 2 the configuration cannot work, 128 + n stopped by signal n.
    """
    try:
        _answer(sys.argv[1:])
    except ConfigError as error:
        print(f"cl-runner: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:  # a run says where it goes on, and which signal it was
        print(f"cl-runner: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(getattr(stopped, "status", 130))


def _answer(argv: list[str]) -> None:
    """Raises ConfigError."""
    if argv[:1] == ["list"]:
        list_choices(argv[1:])
    elif argv and argv[0] in COMMANDS:
        sys.exit(import_module(COMMANDS[argv[0]]).main(argv[1:]))
    elif "--version" in argv:
        print(f"cl-runner {__version__}")
    else:
        from cl_runner.command import hydra_main, run, try_composing

        words = {word.partition("=")[0] for word in argv}
        if not words & ASKS_HYDRA:
            run(argv)
            return
        if words & {"--cfg", "-c"}:
            try_composing(argv)
        hydra_main()


def list_choices(groups: list[str]) -> None:
    """Print every choice of every group, or of those named, a line each.

    Raises ConfigError for a group that is not there.
    """
    from cl_runner.compose import choices

    found = choices()
    unknown = [group for group in groups if group not in found]
    if unknown:
        raise ConfigError("list", f"expected groups among {', '.join(found)}, got {unknown[0]!r}")
    longest = max(len(choice) for group in groups or found for choice in found[group])
    for group in groups or found:
        print(f"{group}=")
        for choice, says in found[group].items():
            print(f"  {choice:<{longest}}  {says}")


if __name__ == "__main__":
    from cl_runner.__main__ import main as main_of_the_package

    main_of_the_package()
