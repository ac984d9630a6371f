"""The entry point: dispatches the command line."""

import sys
from importlib import import_module

from cl_runner import __version__
from cl_runner.closed_pipe import ignore_closed_pipe
from cl_runner.errors import ConfigError, hint
from cl_runner.interrupt import ending_at_once

# These only print something about the configuration: Hydra handles them, and torch is never imported.
ASKS_HYDRA = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}

# Subcommands: modules with main(argv) -> exit status, and parser(). Only those that run something import torch.
COMMANDS = {
    "list": "cl_runner.listing",
    "status": "cl_runner.report.status",
    "report": "cl_runner.report.command",
    "sync": "cl_runner.report.sync",
    "dashboard": "cl_runner.report.dashboard",
    "verify": "cl_runner.verify",
}


def main() -> None:
    """Run the `cl-runner` script.

    Exit status: 0 done, 1 a run failed, 2 the configuration cannot work, 128 + n stopped by signal n.
    """
    with ignore_closed_pipe():
        try:
            _answer(sys.argv[1:])
        except ConfigError as error:
            print(f"cl-runner: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:  # no permission to read a file, say
            if error.filename is None:
                raise
            print(f"cl-runner: {error.filename}: {error.strerror or error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stopped:  # a run says where it resumes, and which signal it was
            print(f"cl-runner: {str(stopped) or 'stopped'}", file=sys.stderr)
            sys.exit(getattr(stopped, "status", 130))


def _answer(argv: list[str]) -> None:
    """Raises ConfigError."""
    if argv and argv[0] in COMMANDS:
        with ending_at_once():
            command = import_module(COMMANDS[argv[0]])
        sys.exit(command.main(argv[1:]))
    elif "--version" in argv:
        print(f"cl-runner {__version__}")
    elif argv and argv[0].isidentifier():
        raise ConfigError(
            "command line", f"expected KEY=VALUE or a command, got {argv[0]!r}; {hint(argv[0], COMMANDS)}"
        )
    else:
        with ending_at_once():
            from cl_runner.command import hydra_main, run, try_composing
            from cl_runner.command_line import in_order
            from cl_runner.compose import for_hydra

        words = {word.partition("=")[0] for word in argv}
        if not words & ASKS_HYDRA:
            run(argv)
            return
        if "--hydra-help" in words:
            sys.argv[1:] = ["--hydra-help"]  # with overrides beside it, Hydra's help is a traceback
        elif words & {"--cfg", "-c"}:
            try_composing(argv)
            sys.argv[1:] = for_hydra(argv)
        else:
            given = in_order(argv)  # refuses stray words in one line, without Hydra's usage
            if "--multirun" in given:
                raise ConfigError("command line", "expected no -m (--multirun) where one configuration is shown")
            if words & {"--help", "-h"}:
                sys.argv[1:] = for_hydra(argv)  # refuses an unknown choice in one line, where Hydra prints several
        hydra_main()


if __name__ == "__main__":
    main()
