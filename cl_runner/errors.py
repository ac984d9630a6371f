"""The one error a user is meant to read."""

from collections.abc import Iterable
from difflib import get_close_matches

EXPERIMENT_HEAD = "an experiment's file has `# @package _global_` as its first line"


class ConfigError(Exception):
    """A setting that cannot work: the field that holds it, and what was expected and what came.

    Raised before any data is touched, but for what only building can tell; the command line prints it as one line and
    exits with status 2.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def in_a_line(error: BaseException) -> str:
    """Its type and the first line of what it says; of a ConfigError, which says all itself, that alone."""
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0]


def missing_extra(field: str, extra: str) -> ConfigError:
    """Of a choice whose packages are not there."""
    return ConfigError(field, f"{extra} needs the extra of that name: pip install '.[{extra}]' where this was cloned")


def hint(word: str, known: Iterable[str], most: int = 1) -> str:
    """What to say of a word that is none of those known: the nearest ones, at most so many, or else all there are."""
    known = list(dict.fromkeys(known))
    return did_you_mean(word, known, most) or f"known: {', '.join(known) or 'none'}"


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """The nearest of the known words, at most so many; empty where none is near: as alike as `cutoff`, of 1."""
    return suggestion(get_close_matches(word, list(known), most, cutoff))


def suggestion(words: Iterable[str]) -> str:
    return f"did you mean {' or '.join(words)}?" if (words := list(words)) else ""
