"""How the commands beside the runner (`status`, `report`, `sync`, ...) read their words."""

import argparse
from typing import NoReturn

from cl_runner.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong as everything else here does: in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.prog.split()[-1], message)
