"""The code that a run is made with: digests of its plugins and of its components' modules.

They are no part of a run's hash, since most changes to a package of methods leave the other methods as they were.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from cl_runner.identity import hashed_part
from cl_runner.targets import imported


def code_of(config: dict[str, Any]) -> dict[str, str]:
    """name -> digest, for the plugins of a validated configuration, and for each module of cl_runner that defines one
    of its components or a class that one of these derives from: as they were when this process first asked, since it
    goes on with what it has loaded."""
    modules = {module for target in _targets(hashed_part(config)) for module in _modules(imported(target))}
    return {name: _as_loaded(name) for name in [*config["plugins"], *sorted(modules)]}


def changed(code: Mapping[str, str]) -> list[str]:
    """The names whose digests are not what they were when `code` was made."""
    return [name for name, digest in code.items() if _digest(name) != digest]


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


def _modules(component: Any) -> Iterator[str]:
    for each in inspect.getmro(component) if inspect.isclass(component) else [component]:
        if each.__module__.startswith("cl_runner."):
            yield each.__module__


_loaded: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()


def _as_loaded(name: str) -> str:
    module = sys.modules.get(name)
    return _digest(name) if module is None else _loaded.setdefault(module, _digest(name))


def _digest(name: str) -> str:
    """Eight hex digits of a module's source, or of all of a package's; empty if it is no longer there."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # nor is the package that it was in
        spec = None
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    if not files and spec and spec.origin:
        files = [Path(spec.origin)]
    files = [file for file in files if file.is_file()]  # an editor may leave dangling links
    meaning = "".join(_meaning_of(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return hashlib.sha256(meaning.encode()).hexdigest()[:8] if files else ""


@cache
def _meaning_of(file: Path, changed: int, size: int) -> str:
    """A Python file without what changes no number: comments, docstrings and layout. `changed`, its time, and `size`
    make the cache miss when the file is another."""
    source = file.read_bytes()
    try:
        return repr(_meaning(ast.parse(source)))
    except SyntaxError:  # a template, say, which lies in the package but is never imported
        return repr(source)


def _meaning(node: Any) -> Any:
    """A syntax tree as nested tuples, the same in all versions of Python, which add fields that are mostly empty."""
    if isinstance(node, ast.AST):
        fields = [(name, _meaning(value)) for name, value in ast.iter_fields(node)]
        return type(node).__name__, [field for field in fields if field[1] != []]
    if isinstance(node, list):
        return [_meaning(each) for each in node if not _is_docstring(each)]
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
