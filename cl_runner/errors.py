"""The error that users are meant to read, and the hints that go with it."""

import os
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

EXPERIMENT_HEAD = "an experiment's file has `# @package _global_` as its first line"


class ConfigError(Exception):
    """A setting that cannot work: its field, what was expected, and what was given.

    Raised before any data is touched, except for what only building a component reveals; the command line prints it as
    one line and exits with status 2.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def in_a_line(error: BaseException) -> str:
    """An error's type and the first line of its message; without the type for a ConfigError."""
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0]


def raised_at(error: BaseException) -> str:
    """Where an error was raised in code that is not installed (a user's own), as file:line; empty if it was not.

    The file that caught the error is left out.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.relpath(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    others = [(frame.filename, frame.lineno) for frame in frames if frame.filename != frames[0].filename]
    own = [(file, line) for file, line in others if Path(file).is_file() and not _is_installed(file)]
    return f"{os.path.relpath(own[-1][0])}:{own[-1][1]}" if own else ""


def _is_installed(file: str) -> bool:
    return "site-packages" in file or file.startswith(sysconfig.get_path("stdlib"))


def missing_extra(field: str, extra: str) -> ConfigError:
    """The error for a choice whose packages are not installed."""
    return ConfigError(field, f"{extra} needs the extra of that name: pip install '.[{extra}]' where this was cloned")


def hint(word: str, known: Iterable[str], most: int = 1) -> str:
    """A hint for an unknown word: at most `most` of the nearest known ones, or all of them if none is near."""
    known = list(dict.fromkeys(known))
    return did_you_mean(word, known, most) or f"known: {', '.join(known) or 'none'}"


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """A hint that names at most `most` of the known words, of a similarity of at least `cutoff`; empty if none is."""
    return suggestion(get_close_matches(word, list(known), most, cutoff))


def suggestion(words: Iterable[str]) -> str:
    return f"did you mean {' or '.join(words)}?" if (words := list(words)) else ""
