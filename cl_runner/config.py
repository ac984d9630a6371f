"""From a configuration to checked components: check, build. The only place that builds a `_target_`."""

import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cl_runner.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import: `--help` and completion do without
    import torch

OmegaConf.register_new_resolver("run_folder", lambda *, _root_: str(run_folder(validated(_root_))), replace=True)
OmegaConf.register_new_resolver("run_folder_name", lambda *, _root_: run_folder(validated(_root_)).name, replace=True)

# A config is not a program: only these may be named by a `_target_`, beside what `plugins` lists.
ALLOWED = ("cl_runner", "torch.optim", "torchvision", "timm")

# What each component must be. The scheduler is any callable that takes what a run provides.
KINDS = {
    "stream": "cl_runner.streams.recipe.Recipe",
    "model": "cl_runner.models.architecture.Architecture",
    "strategy": "cl_runner.strategies.base.Strategy",
    "fisher": "cl_runner.fisher.estimators.Estimator",
    "memory": "cl_runner.memory.base.Memory",
    "optimizer": "torch.optim.Optimizer",
    "trainer": "cl_runner.trainer.Trainer",
    "tracker": "cl_runner.trackers.base.Null",
}
COMPONENTS = ("stream", "model", "strategy", "optimizer", "scheduler", "trainer", "tracker")
PROVIDED = {"optimizer": {"params"}, "scheduler": {"optimizer", "steps"}}  # arguments that come when a run builds them

# These change where and how a run is carried out and watched, not what it computes.
NOT_HASHED = ("device", "data_root", "output_root", "rerun", "fisher", "memory", "tracker", "trainer.log_every")
NOT_HASHED += ("trainer.checkpoint_every", "trainer.checkpoint_seconds", "trainer.keep_checkpoint")
NOT_HASHED += ("stream.download", "stream.max_device_gb")
NOT_OURS = ("hydra", "published")  # Hydra's own, and what an experiment's file says of published results
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
ANY_SEED = 2**31 - 1  # stands for the seed where runs that differ in nothing else are one group


class Settings(BaseModel):
    """The top level of the configuration; the components are checked against what their `_target_` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    data_root: str
    output_root: str
    rerun: bool
    plugins: list[str]
    stream: dict[str, Any]
    model: dict[str, Any]
    strategy: dict[str, Any]
    fisher: dict[str, Any]
    memory: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    trainer: dict[str, Any]
    tracker: dict[str, Any]


@dataclass
class Experiment:
    """A configuration that has been checked, and its components, built but holding neither data nor a network."""

    config: dict[str, Any]  # plain, validated
    group: str  # hash of everything but the seed
    stream: Any
    model: Any
    strategy: Any
    trainer: Any
    tracker: Any
    device: "torch.device"

    @property
    def make_optimizer(self) -> Callable[..., Any]:
        return partial(build, self.config["optimizer"])

    @property
    def make_scheduler(self) -> Callable[..., Any]:
        return partial(build, self.config["scheduler"])

    @property
    def hash(self) -> str:
        return digest(self.config)

    @property
    def folder(self) -> Path:
        return run_folder(self.config)


def run_folder(config: dict[str, Any]) -> Path:
    """Where a validated configuration's run lies: the same for the same work, whenever it is asked for."""
    return Path(config["output_root"]) / f"{label(config)}-s{config['seed']}-{digest(config)}"


def label(config: dict[str, Any]) -> str:
    """Strategy, stream and model, readable."""

    def short(node: dict[str, Any]) -> str:
        target = _import(node["_target_"])
        return getattr(target, "kind", target.__name__.lower())

    stream = f"{short(config['stream'])}_{config['stream']['name']}"
    return f"{short(config['strategy'])}-{stream}-{config['model'].get('name') or short(config['model'])}"


def check(cfg: DictConfig) -> Experiment:
    """Check everything that can be known before data are loaded, and build the components.

    Raises ConfigError, which names the field.
    """
    config = validated(cfg)
    built = {name: _named(name, partial(build, config[name])) for name in COMPONENTS if name not in PROVIDED}
    experiment = Experiment(config=config, group=_group(cfg), device=_device(config["device"]), **built)
    _check_optimizer(experiment)
    _check_output_root(config["output_root"])
    experiment.model.check()
    experiment.strategy.check(experiment.stream, experiment.model)
    _check_active_logits(config["trainer"]["active_logits"], experiment.stream.scenario)
    experiment.stream.prepare(config["data_root"])  # late: it may download and decode
    experiment.model.check_images(experiment.stream.image_shape)
    return experiment


def validated(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration with every value held to its type: 1 and 1.0 become one where a float is meant.

    Raises ConfigError.
    """
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_OURS])
    try:
        plain: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        field = error.full_key or "config"
        raise ConfigError(str(field), str(error).splitlines()[0]) from None
    _refuse_unknown("", plain, Settings.model_fields)
    try:
        Settings.model_validate(plain)
    except ValidationError as error:
        raise _config_error("", error) from None
    allowed = (*ALLOWED, *_found(plain["plugins"]))
    for name in ("fisher", "memory", *COMPONENTS):
        plain[name] = _checked_node(name, plain[name], allowed, PROVIDED.get(name, set()))
    own = plain["trainer"].get("first_task") or {}
    for name in ("optimizer", "scheduler"):
        if given := own.get(name):
            path = f"trainer.first_task.{name}"
            checked = _checked_node(path, {**plain[name], **given}, allowed, PROVIDED[name])
            own[name] = {key: checked[key] for key in given}
    return plain


def _found(plugins: list[str]) -> list[str]:
    """`plugins`, which may lie where the command is given: a console script, unlike `python -m`, does not look there.

    Raises ConfigError for one that is not there.
    """
    if plugins and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    for name in plugins:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ConfigError("plugins", f"expected packages that can be imported, or lie here, got {name!r}")
    return plugins


def check_plugin(path: str, node: dict[str, Any], package: str) -> None:
    """Hold a launcher's or sweeper's values to its arguments, and hear what it would refuse itself.

    Raises ConfigError.
    """
    build(_checked_node(path, node, (package,), set()))


def build(node: dict[str, Any], **provided: Any) -> Any:
    """Call a checked node's `_target_` with its arguments, nodes among them (and in mappings of them) built first;
    `provided` ones count before the node's."""

    def built(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return build(value) if "_target_" in value else {key: built(inner) for key, inner in value.items()}

    arguments = {key: built(value) for key, value in node.items() if key != "_target_"}
    return _import(node["_target_"])(**{**arguments, **provided})


def digest(config: dict[str, Any]) -> str:
    """Eight hex digits of what a run computes."""
    plain = json.loads(json.dumps(config))
    for path in (*NOT_HASHED, "trainer.epochs" if config["trainer"].get("iterations") else "trainer.iterations"):
        *parents, key = path.split(".")
        node = plain
        for parent in parents:
            node = node[parent]
        node.pop(key, None)
    weights = Path(str(plain["model"].get("pretrained"))).expanduser()
    if weights.is_file():  # what is in the file counts, not where it lies
        plain["model"]["pretrained"] = _file_digest(weights, weights.stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


@lru_cache
def _file_digest(path: Path, changed: int) -> str:
    """`changed` is only there so that a file is read again when it is another."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _group(cfg: DictConfig) -> str:
    """The hash with the seed replaced before anything is interpolated from it."""
    seedless = cfg.copy()
    seedless.seed = ANY_SEED
    return digest(validated(seedless))


@contextmanager
def _naming(field: str):
    """What a component says against its arguments becomes an error that names it."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(field, str(error).splitlines()[0]) from error


def _named(field: str, make: Callable[[], Any]) -> Any:
    with _naming(field):
        return make()


def _checked_node(
    path: str, node: dict[str, Any], allowed: Iterable[str], provided: set[str], kind: str | None = None
) -> dict[str, Any]:
    """The node with its values validated against its target's signature; `kind`: what it must be, if its name does
    not say so."""
    if "_target_" not in node:
        raise ConfigError(f"{path}._target_", "expected the name of a class or function, got nothing")
    target = _import(node["_target_"], path, tuple(allowed))
    kind = kind or KINDS.get(path.rpartition(".")[2])
    if kind and not (inspect.isclass(target) and issubclass(target, _import(kind))):
        raise ConfigError(f"{path}._target_", f"expected a {kind.rpartition('.')[2]}, got {node['_target_']!r}")
    parameters = inspect.signature(target).parameters
    _refuse_unknown(path, {key: None for key in node if key != "_target_"}, parameters.keys() - provided)
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
    # What a YAML leaves out has its default all the same: the work, and so its hash, are those of the whole YAML.
    left_out = {
        name: parameters[name].default
        for name in parameters.keys() - checked.keys() - provided
        if type(parameters[name].default) in (int, float, bool, str, type(None))
    }
    return {**checked, **left_out}


def _checked_value(path: str, value: Any, hint: Any, allowed: Iterable[str]) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return _checked_node(path, value, allowed, set())
    if path.rpartition(".")[2] in KINDS:
        raise ConfigError(path, f"expected a component (a mapping with a _target_), got {value!r}")
    if get_origin(hint) is dict and (kind := _kind_of(get_args(hint)[1])):
        return _checked_nodes(path, value, allowed, kind)
    try:
        adapter = TypeAdapter(hint, config=_STRICT)
        # As JSON a list may stand for a tuple and a string for an enum, and nothing else is converted.
        return adapter.dump_python(adapter.validate_json(json.dumps(value)), mode="json", warnings=False)
    except ValidationError as error:
        raise _config_error(path, error) from None


def _checked_nodes(path: str, nodes: Any, allowed: Iterable[str], kind: str) -> dict[str, Any]:
    """Components of one kind by names of their own."""
    if not isinstance(nodes, dict):
        raise ConfigError(path, f"expected components by name, got {nodes!r}")
    for name, node in nodes.items():
        if not isinstance(node, dict):
            raise ConfigError(f"{path}.{name}", f"expected a component (a mapping with a _target_), got {node!r}")
    return {name: _checked_node(f"{path}.{name}", node, allowed, set(), kind) for name, node in nodes.items()}


def _kind_of(hint: Any) -> str | None:
    """The entry of KINDS that a type is."""
    name = f"{getattr(hint, '__module__', '')}.{getattr(hint, '__qualname__', '')}"
    return name if name in KINDS.values() else None


def _import(target: Any, path: str = "_target_", allowed: tuple[str, ...] | None = None) -> Any:
    def permitted(name: str) -> bool:
        return allowed is None or any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)

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
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_", f"expected something importable, got {target!r} ({error})") from None
    # A permitted module's own imports are not permitted with it.
    if not callable(found) or not permitted(getattr(found, "__module__", "") or ""):
        raise ConfigError(
            f"{path}._target_", f"expected a class or function of {', '.join(allowed or ())}, got {target!r}"
        )
    return found


def _refuse_unknown(path: str, given: Iterable[str], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            field = f"{path}.{key}" if path else key
            near = get_close_matches(key, list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(field, f"unknown key; {hint}")


def _config_error(path: str, error: ValidationError) -> ConfigError:
    """One line for pydantic's list: where, what was expected (of every branch of a union), and what came."""
    problems = error.errors()
    inner = [str(part) for part in problems[0]["loc"] if isinstance(part, int) or (not path and part)]
    field = ".".join([part for part in [path] if part] + inner)
    if problems[0]["type"] == "extra_forbidden":
        return ConfigError(".".join([path, *map(str, problems[0]["loc"])]), "unknown key")
    if problems[0]["type"] == "missing":
        return ConfigError(field, "expected a value, got nothing")
    wanted = dict.fromkeys(_expected(p["msg"]) for p in problems if "isinstance" not in p["msg"])
    return ConfigError(field or path, f"expected {' or '.join(wanted)}, got {problems[0]['input']!r}")


def _expected(message: str) -> str:
    message = (
        message.removeprefix("Input should be ")
        .removeprefix("Value should have ")
        .removeprefix("a valid ")
        .removeprefix("an instance of ")
    )
    plain = {
        "number": "float",
        "integer": "int",
        "string": "str",
        "boolean": "bool",
        "dictionary": "a mapping",
        "array": "a list",
    }
    message = re.sub(r"^String should match pattern .*", "auto, cpu, mps, cuda or cuda:N", message)
    return plain.get(message, message.replace("None", "null").replace("greater than or equal to", "at least"))


def _check_optimizer(experiment: Experiment) -> None:
    """Let the optimizer and the scheduler say now, on one dummy weight, what they would say later."""
    import torch

    first = experiment.config["trainer"].get("first_task") or {}
    for prefix, own in (("", {}), ("trainer.first_task.", first)):
        weight = torch.zeros(1, device=experiment.device, requires_grad=True)
        weight.grad = torch.zeros_like(weight)
        with _naming(f"{prefix}optimizer"):
            optimizer = experiment.make_optimizer(params=[weight], **(own.get("optimizer") or {}))
            optimizer.step()
        with _naming(f"{prefix}scheduler"):
            experiment.make_scheduler(optimizer=optimizer, steps=100, **(own.get("scheduler") or {}))


def _check_output_root(output_root: str) -> None:
    """Runs can be written where they are to be written."""
    existing = Path(output_root).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError("output_root", f"expected a folder that can be written, got {output_root!r}")


def _check_active_logits(active: str | None, scenario: str) -> None:
    if scenario == "domain" and active not in (None, "all"):
        raise ConfigError(
            "trainer.active_logits",
            f"expected all or null where tasks share their classes (domain), got {active!r}",
        )


def _device(name: str) -> "torch.device":
    """The device meant by `name`.

    Raises ConfigError where it is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there[device.type]:
        exist = ["auto", "cpu", *(f"cuda:{i}" for i in range(there["cuda"])), *["mps"][: there["mps"]]]
        raise ConfigError("device", f"expected one of {', '.join(exist)} (what this machine has), got {name!r}")
    return device
