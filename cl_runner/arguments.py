"""Argument parsing for the subcommands (`status`, `report`, `sync`, ...)."""

import argparse
from typing import NoReturn

from cl_runner.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        refuse_arguments(self, self.prog.split()[-1], message)


def refuse_arguments(parser: argparse.ArgumentParser, field: str, message: str) -> NoReturn:
    """Raise a parser's error message as a ConfigError, with the option that may have been meant."""
    options = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    if message.startswith("the following arguments are required"):
        message = f"{message}; {parser.format_usage().strip()}"
    if message.startswith("unrecognized arguments") and options:
        message = "; ".join(filter(None, [message, did_you_mean(options[0], parser._option_string_actions)]))
    raise ConfigError(field, message)
