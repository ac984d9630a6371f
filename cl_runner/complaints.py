"""Complaints about a configuration, by pydantic or by a component, in one line each that names the field."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from cl_runner.errors import ConfigError, hint


def refuse_unknown(path: str, given: Iterable[str], known: Iterable[str], meant: str = "") -> None:
    """Raise ConfigError for a key that is not known. `meant`: a better hint than the names alone give."""
    for key in given:
        if key not in known:
            field = f"{path}.{key}" if path else key
            raise ConfigError(field, f"unknown key; {meant or hint(key, sorted(known))}")


def one_line(path: str, value: Any, error: ValidationError, known: Iterable[str] = ()) -> ConfigError:
    """One line for pydantic's errors about `value`: the field, what was expected (by any branch of a union), and what
    was given. `known`: the keys that `value` may have."""
    ways = [list(_on_the_way(value, problem["loc"])) for problem in error.errors()]
    way = max(ways, key=len)  # of a union, the branch that fits the value best fails at a place within it
    problems = [problem for problem, its in zip(error.errors(), ways, strict=True) if its == way]
    place, kind = problems[0]["loc"], problems[0]["type"]
    field = ".".join([*filter(None, [path]), *way])
    if kind == "extra_forbidden":
        return ConfigError(field, f"unknown key; {hint(way[-1], known)}")
    if kind == "missing":
        return ConfigError(f"{field}.{place[-1]}".removeprefix("."), "expected a value, got nothing")
    wanted = dict.fromkeys(_expected(p["msg"]) for p in problems if "isinstance" not in p["msg"])
    given = problems[0]["input"]
    alone = list(wanted) == ["a list"] and isinstance(given, str | int | float) and given != ""
    listed = f"; one is written as [{given}]" if alone else ""
    return ConfigError(field, f"expected {' or '.join(wanted)}, got {given!r}{listed}")


def _on_the_way(value: Any, place: Iterable[int | str]) -> Iterator[str]:
    """The keys and indices that lead to a place in `value`, without the union branches that pydantic mixes in."""
    for part in place:
        if isinstance(value, dict) if isinstance(part, str) else isinstance(value, list):
            try:
                value = value[part]
            except LookupError:
                continue
            yield str(part)


def _expected(message: str) -> str:
    message = re.sub(r"^\w+ should have (at \w+ \d+ items?) after validation, not \d+$", r"\1", message)
    message = (
        message.removeprefix("Input should be ")
        .removeprefix("a valid ")
        .removeprefix("an instance of ")
        .replace("String should have ", "text of ")
    )
    plain = {
        "number": "float",
        "integer": "int",
        "string": "str",
        "boolean": "bool",
        "dictionary": "a mapping",
        "array": "a list",
        "list": "a list",
        "an object": "a mapping",
    }
    return plain.get(message, message.replace("None", "null").replace("greater than or equal to", "at least"))


@contextmanager
def naming(field: str, values: Mapping[str, Any] = MappingProxyType({})):
    """Turn a component's complaint about its arguments into a ConfigError that names it, and of its `values` the one
    in question, where the message shows it (torch: "Invalid learning rate: -1.0"), or one of its items."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        shown = message.rpartition(": ")[2]
        meant = [
            key for key, value in values.items() if shown in map(str, value if isinstance(value, list) else [value])
        ]
        if len(meant) != 1:
            raise ConfigError(field, message) from error
        says = (
            f"expected at least 0, got {shown}" if message.startswith("Invalid") and shown.startswith("-") else message
        )
        raise ConfigError(f"{field}.{meant[0]}", says) from error
