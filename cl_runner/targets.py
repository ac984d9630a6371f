"""What a `_target_` names: classes and functions of permitted packages."""

import importlib
from collections.abc import Iterable
from typing import Any

from cl_runner.errors import ConfigError, raised_at

# A config is not a program: a `_target_` may name only these, and what `plugins` lists.
LIBRARIES = ("torch.optim", "torchvision", "timm")
ALLOWED = ("cl_runner", *LIBRARIES)


def imported(target: Any, path: str = "_target_", allowed: tuple[str, ...] | None = None) -> Any:
    def permitted(name: str) -> bool:
        return allowed is None or is_in(name, allowed)

    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_", f"expected the name of a class or function, got {target!r}")
    module_name, _, name = target.rpartition(".")
    if not permitted(target):
        raise ConfigError(
            f"{path}._target_",
            f"expected a name in {', '.join(allowed or ())} (or a package in plugins), got {target!r}",
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the module's own code may raise anything
        message = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        kind = ": ".join(filter(None, [type(error).__name__, message]))
        why = ", ".join(filter(None, [kind, raised_at(error)]))
        raise ConfigError(f"{path}._target_", f"expected something importable, got {target!r} ({why})") from None
    # What a permitted module imports is not permitted with it.
    if not callable(found) or not permitted(getattr(found, "__module__", "") or ""):
        raise ConfigError(
            f"{path}._target_", f"expected a class or function of {', '.join(allowed or ())}, got {target!r}"
        )
    return found


def is_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
