"""How the commands beside the runner (`status`, `report`, `sync`, ...) read their words."""

import argparse
from typing import NoReturn

from cl_runner.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Says what is wrong as everything else here does: in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        refuse_arguments(self, self.prog.split()[-1], message)


def refuse_arguments(parser: argparse.ArgumentParser, field: str, message: str) -> NoReturn:
    """What a parser has to say, and the option that may be meant.

    Raises ConfigError.
    """
    options = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    if message.startswith("the following arguments are required"):
        message = f"{message}; {parser.format_usage().strip()}"
    if message.startswith("unrecognized arguments") and options:
        message = "; ".join(filter(None, [message, did_you_mean(options[0], parser._option_string_actions)]))
    raise ConfigError(field, message)
