"""Single overrides in Hydra's grammar: how they are written, and the values that they stand for."""

import math
import re
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from cl_runner.errors import ConfigError

BRACKETS = ("()", "[]", "{}")


def word_of(override: Override) -> str:
    """The override as it is typed."""
    key = override.get_key_element()
    return key if override.is_delete() else f"{key}={override.get_value_element_as_str()}"


def values_of(override: Override, ends: bool = False) -> Iterator[str]:
    """The single overrides that a sweep override stands for; with `ends`, an interval stands for its two ends."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        yield word_of(override)
    elif override.is_discrete_sweep():
        try:
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        except ValueError as error:  # a step of 0
            raise ConfigError(key, str(error)) from None
        if not values:
            raise ConfigError(key, f"expected values to take in turn, got none in {override.input_line}")
        yield from values
    elif ends and isinstance(interval := override.value(), IntervalSweep):
        _refuse_no_interval(key, interval, override.input_line)
        yield from (f"{key}={value}" for value in (interval.start, interval.end))
    else:
        raise ConfigError(key, "expected values to take in turn; an interval is for hydra/sweeper=optuna")


def _refuse_no_interval(key: str, interval: IntervalSweep, word: str | None) -> None:
    low, high = float(interval.start or 0), float(interval.end or 0)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ConfigError(key, f"expected an interval from a lower number to a higher one, got {word}")
    if "log" in interval.tags and low <= 0:
        raise ConfigError(key, f"expected a logarithmic interval to begin above 0, got {word}")


def hint_on_quotes(words: Sequence[str]) -> str:
    """A hint on how to quote the first word that Hydra cannot parse; empty if there is none."""
    for word in words:
        key, equals, value = word.partition("=")
        if re.match(r"{|\w+\(", value) or any(value.count(one) != value.count(other) for one, other in BRACKETS):
            continue  # a mapping or a sweep, or a bracket is missing
        parts = [part.strip() for part in value.removeprefix("[").removesuffix("]").split(",")]
        meant = f"[{','.join(map(repr, parts))}]" if value.startswith("[") else repr(value)
        if equals and not _can_be_read(word) and "'" not in value and _can_be_read(f"{key}={meant}"):
            return f'; such a value needs quotes of its own: "{key}={meant}"'
    return ""


def _can_be_read(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True
