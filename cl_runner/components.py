"""Check a node of the configuration against its `_target_`'s signature, then build the component.

This is the only place that builds a `_target_`.
"""

import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cl_runner import CONF
from cl_runner.complaints import one_line, refuse_unknown
from cl_runner.errors import ConfigError, did_you_mean, suggestion
from cl_runner.targets import LIBRARIES, imported, is_in

# The base class of each component. The scheduler is any callable that takes what a run provides.
KINDS = {
    "stream": "cl_runner.streams.recipe.Recipe",
    "model": "cl_runner.models.architecture.Architecture",
    "strategy": "cl_runner.strategies.base.Strategy",
    "fisher": "cl_runner.fisher.estimators.Estimator",
    "memory": "cl_runner.memory.base.Memory",
    "optimizer": "torch.optim.Optimizer",
    "trainer": "cl_runner.trainer.Trainer",
    "tracker": "cl_runner.trackers.base.NullTracker",
}
PROVIDED = {"optimizer": {"params"}, "scheduler": {"optimizer", "steps"}}  # arguments that a run passes in

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def checked_node(
    path: str, node: dict[str, Any], allowed: Iterable[str], provided: set[str], kind: str | None = None
) -> dict[str, Any]:
    """The node with its values validated against its target's signature.

    kind: the base class that the target must have, if the node's name does not tell. Raises ConfigError.
    """
    if "_target_" not in node:
        raise ConfigError(f"{path}._target_", "expected the name of a class or function, got nothing")
    target = imported(node["_target_"], path, tuple(allowed))
    kind = kind or KINDS.get(path.rpartition(".")[2])
    if kind and not (inspect.isclass(target) and issubclass(target, imported(kind))):
        raise ConfigError(f"{path}._target_", f"expected a class derived from {kind}, got {node['_target_']!r}")
    parameters = inspect.signature(target).parameters
    known = parameters.keys() - provided
    for key in node:
        if key != "_target_" and key not in known:
            meant = suggestion(_within(node, key, path, parameters)) or _choices_with(key, path, kind)
            refuse_unknown(path, [key], known, meant)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in node and name not in provided
    ]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}", "expected a value, got nothing")
    hints = inspect.get_annotations(target if inspect.isfunction(target) else target.__init__, eval_str=True)
    checked = {
        key: _checked_value(f"{path}.{key}", value, hints.get(key, Any), allowed) if key != "_target_" else value
        for key, value in node.items()
    }
    if is_in(node["_target_"], LIBRARIES):  # an argument that is new in their next version must change no run's hash
        return checked
    # What a YAML leaves out has its default all the same: the work, and so its hash, are those of the whole YAML.
    left_out = {
        name: parameters[name].default
        for name in parameters.keys() - checked.keys() - provided
        if type(parameters[name].default) in (int, float, bool, str, type(None))
    }
    return {**checked, **left_out}


def build(node: dict[str, Any], **provided: Any) -> Any:
    """Call a checked node's `_target_` with its arguments; nested nodes, also in mappings, are built first.

    `provided` arguments take precedence over the node's.
    """

    def built(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return build(value) if "_target_" in value else {key: built(inner) for key, inner in value.items()}

    arguments = {key: built(value) for key, value in node.items() if key != "_target_"}
    return imported(node["_target_"])(**{**arguments, **provided})


def check_plugin(path: str, node: dict[str, Any], package: str) -> None:
    """Check a launcher's or sweeper's values against its signature, and build it once for its own checks.

    Raises ConfigError.
    """
    build(checked_node(path, node, (package,), set()))


def _within(node: dict[str, Any], key: str, path: str, known: Iterable[str] | None = None) -> Iterator[str]:
    """Paths below the node that end in `key`, searched below the `known` keys only (None: all)."""
    for name, value in node.items():
        if isinstance(value, dict) and (known is None or name in known):
            if key in value:
                yield f"{path}.{name}.{key}"
            yield from _within(value, key, f"{path}.{name}")


def _choices_with(key: str, path: str, kind: str | None) -> str:
    """A hint that names the choices of the node's group in conf/ that take `key`; empty if none does."""
    group = next((name for name, its in KINDS.items() if its == kind), path.rpartition(".")[2])
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((CONF / group).glob("*.yaml"))}
    names = [name for name, node in nodes.items() if key in inspect.signature(imported(node["_target_"])).parameters]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} it" if names else ""


def _checked_value(path: str, value: Any, hint: Any, allowed: Iterable[str]) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return checked_node(path, value, allowed, set())
    if (name := path.rpartition(".")[2]) in KINDS:
        if isinstance(value, dict) and value:
            key = next(iter(value))
            raise ConfigError(f"{path}.{key}", f"set {name}.{key} instead: {path} stands for the whole of {name}")
        raise ConfigError(path, f"expected a component (a mapping with a _target_), got {value!r}")
    if get_origin(hint) is dict and (kind := _kind_of(get_args(hint)[1])):
        return _checked_nodes(path, value, allowed, kind)
    try:
        adapter = TypeAdapter(hint, config=_STRICT)
        # In JSON mode a list may stand for a tuple and a string for an enum; nothing else is converted.
        return adapter.dump_python(adapter.validate_json(json.dumps(value)), mode="json", warnings=False)
    except ValidationError as error:
        raise one_line(path, value, error, _fields(hint)) from None


def _fields(annotation: Any) -> list[str]:
    """The fields of the pydantic models that an annotation names."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if inspect.isclass(kind)]
    return [field for kind in kinds if issubclass(kind, BaseModel) for field in kind.model_fields]


def _checked_nodes(path: str, nodes: Any, allowed: Iterable[str], kind: str) -> dict[str, Any]:
    """A mapping of names to components of one kind, checked."""
    if not isinstance(nodes, dict):
        raise ConfigError(path, f"expected components by name, got {nodes!r}")
    for name, node in nodes.items():
        choosing = f"{path.partition('.')[0]}@{path}.{name}"
        if not isinstance(node, dict):
            word = node if isinstance(node, str) else "CHOICE"
            way = f"{choosing}={word} chooses one (a new one: +{choosing})" if node else f"~{choosing} removes it"
            raise ConfigError(f"{path}.{name}", f"expected a component, got {node!r}; {way}")
        if "_target_" not in node:
            there = [other for other, its in nodes.items() if isinstance(its, dict) and "_target_" in its]
            near = did_you_mean(name, there) or f"+{choosing}=CHOICE adds one"
            raise ConfigError(f"{path}.{name}", f"there is no such part; {near}")
    return {name: checked_node(f"{path}.{name}", node, allowed, set(), kind) for name, node in nodes.items()}


def _kind_of(hint: Any) -> str | None:
    """The entry of KINDS that a type annotation names, if any."""
    name = f"{getattr(hint, '__module__', '')}.{getattr(hint, '__qualname__', '')}"
    return name if name in KINDS.values() else None
