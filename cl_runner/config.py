"""Turn a configuration into a checked experiment: its schema, and every check that needs no data."""

import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from cl_runner.complaints import naming, one_line, refuse_unknown
from cl_runner.components import KINDS, PROVIDED, build, checked_node
from cl_runner.errors import EXPERIMENT_HEAD, ConfigError, did_you_mean, suggestion
from cl_runner.folder import RunFolder
from cl_runner.identity import ANY_SEED, digest, run_folder
from cl_runner.ranges import Seed
from cl_runner.targets import ALLOWED, imported

if TYPE_CHECKING:  # torch takes seconds to import; `--help` and completion do without it
    import torch

    from cl_runner.models.architecture import Architecture
    from cl_runner.models.model import ActiveLogits
    from cl_runner.strategies.base import Strategy
    from cl_runner.streams.recipe import Recipe
    from cl_runner.trackers.base import Tracker
    from cl_runner.trainer import Trainer

OmegaConf.register_new_resolver("run_folder", lambda *, _root_: str(run_folder(validated(_root_))), replace=True)
OmegaConf.register_new_resolver("run_folder_name", lambda *, _root_: run_folder(validated(_root_)).name, replace=True)

log = logging.getLogger("cl_runner")
COMPONENTS = ("stream", "model", "strategy", "optimizer", "scheduler", "trainer", "tracker")
NOT_OURS = ("hydra", "published")  # Hydra's own, and an experiment file's published results


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise PydanticCustomError("device", "auto, cpu, mps, cuda or cuda:N")
    return name


class Settings(BaseModel):
    """The top level of the configuration; components are checked against the signatures of their `_target_`s."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: Seed
    device: Annotated[str, AfterValidator(_known_device)]
    data_root: str
    output_root: Annotated[str, Field(min_length=1)]
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
    """A checked configuration and its components, which are built but hold neither data nor a network yet."""

    config: dict[str, Any]  # plain, validated
    hash: str  # as it was when the experiment was checked: a file of weights may be replaced during the run
    folder: Path
    group: str  # hash of everything but the seed
    stream: "Recipe"
    model: "Architecture"
    strategy: "Strategy"
    trainer: "Trainer"
    tracker: "Tracker"
    device: "torch.device"

    @property
    def active_logits(self) -> "ActiveLogits | None":
        """Which outputs the loss compares: as the trainer says, or the method; None: as is usual in the scenario."""
        return self.trainer.active_logits or self.strategy.active_logits

    @property
    def make_optimizer(self) -> Callable[..., Any]:
        return partial(build, self.config["optimizer"])

    @property
    def make_scheduler(self) -> Callable[..., Any]:
        return partial(build, self.config["scheduler"])


def check(cfg: DictConfig, tried: list[Any] | None = None) -> Experiment:
    """Build the components and, unless the run is done, check everything that can be known before data are loaded.

    tried: pairs of model and image shape that earlier jobs of a sweep have shown to fit, since testing one takes
    building a network; this job's is added. Raises ConfigError, which names the field.
    """
    config = validated(cfg)
    built = {}
    for name in COMPONENTS:
        if name not in PROVIDED:
            with naming(name):
                built[name] = build(config[name])
    experiment = Experiment(
        config=config,
        hash=digest(config),
        folder=run_folder(config),
        group=_group(cfg),
        device=_device(config["device"]),
        **built,
    )
    if RunFolder(experiment.folder).done and not config["rerun"]:
        return experiment  # it is only shown, which needs neither data nor an optimizer
    _check_optimizer(experiment)
    _check_output_root(config["output_root"])
    experiment.model.check()
    _check_hooks(type(experiment.strategy))
    _warn_of_misspelt_hooks(type(experiment.strategy))
    experiment.strategy.check(experiment.stream, experiment.model)
    _check_active_logits(config["trainer"]["active_logits"], experiment.stream.scenario)
    experiment.stream.prepare(config["data_root"])  # late: it may download and decode
    _check_single_classes(experiment)
    _check_images(experiment, [] if tried is None else tried)
    return experiment


def validated(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration with every value converted to its type, so that 1 and 1.0 are the same float.

    Raises ConfigError.
    """
    plain = with_valid_settings(cfg)
    allowed = (*ALLOWED, *_found(plain["plugins"]))
    for name in ("fisher", "memory", *COMPONENTS):
        plain[name] = checked_node(name, plain[name], allowed, PROVIDED.get(name, set()))
    own = plain["trainer"].get("first_task") or {}
    for name in ("optimizer", "scheduler"):
        if given := own.get(name):
            path = f"trainer.first_task.{name}"
            checked = checked_node(path, {**plain[name], **given}, allowed, PROVIDED[name])
            own[name] = {key: checked[key] for key in given}
    return plain


def with_valid_settings(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration with everything but the components checked, which imports none of their modules.

    Raises ConfigError.
    """
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_OURS])
    try:
        plain: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(str(error.full_key), "expected a value, got nothing") from None
    except OmegaConfBaseException as error:
        field = error.full_key or "config"
        raise ConfigError(str(field), str(error).splitlines()[0]) from None
    _refuse_unknown_fields(plain)
    try:
        Settings.model_validate(plain)
    except ValidationError as error:
        raise one_line("", plain, error) from None
    return plain


def _refuse_unknown_fields(plain: dict[str, Any]) -> None:
    """Refuse unknown top-level keys, where `epoch=3` may mean `trainer.epochs=3`."""
    places = {field: [field] for field in Settings.model_fields}
    for name, node in plain.items():
        for key in node if isinstance(node, dict) else ():
            places.setdefault(key, []).append(f"{name}.{key}")
    if "experiment" in plain:
        raise ConfigError("experiment", f"unknown key; {EXPERIMENT_HEAD}")
    for key in plain:
        if key not in Settings.model_fields:
            meant = [place for near in get_close_matches(key, places, n=1) for place in places[near]]
            refuse_unknown("", [key], Settings.model_fields, suggestion(meant))


def _found(plugins: list[str]) -> list[str]:
    """`plugins`, once the working directory is on the path, where a console script, unlike `python -m`, lacks it.

    Raises ConfigError for a plugin that cannot be found.
    """
    if plugins and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    for name in plugins:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ConfigError(
                "plugins", f"expected packages that are installed or in the working directory, got {name!r}"
            )
    return plugins


def _group(cfg: DictConfig) -> str:
    """The hash with the seed replaced, also wherever it is interpolated."""
    seedless = cfg.copy()
    seedless.seed = ANY_SEED
    return digest(validated(seedless))


def _check_optimizer(experiment: Experiment) -> None:
    """Try the optimizer and the scheduler on a dummy weight, so that they raise now what they would raise later."""
    import torch

    first = experiment.config["trainer"].get("first_task") or {}
    for prefix, own in (("", {}), ("trainer.first_task.", first)):
        weight = torch.zeros(1, device=experiment.device, requires_grad=True)
        weight.grad = torch.zeros_like(weight)
        with naming(f"{prefix}optimizer", {**experiment.config["optimizer"], **(own.get("optimizer") or {})}):
            optimizer = experiment.make_optimizer(params=[weight], **(own.get("optimizer") or {}))
            optimizer.step()
        with naming(f"{prefix}scheduler"):
            experiment.make_scheduler(optimizer=optimizer, steps=100, **(own.get("scheduler") or {}))


def _check_hooks(strategy: type) -> None:
    """Refuse a hook that does not take what it is called with."""
    for name, hook in inspect.getmembers(imported(KINDS["strategy"]), inspect.isfunction):
        own = inspect.getattr_static(strategy, name)  # a static method is no function here
        if own is hook or not inspect.isfunction(own):
            continue
        wanted, taken = inspect.signature(hook), inspect.signature(own)
        try:
            taken.bind(*wanted.parameters)
        except TypeError:
            expected, got = (f"({', '.join(each.parameters)})" for each in (wanted, taken))
            place = f"{os.path.relpath(own.__code__.co_filename)}:{own.__code__.co_firstlineno}"
            says = f"expected {strategy.__name__}.{name}{expected}, got {got} ({place})"
            raise ConfigError("strategy", says) from None


@cache
def _warn_of_misspelt_hooks(strategy: type) -> None:
    """Warn once per process of a hook with a misspelt name, which is never called: the method silently fine-tunes."""
    hooks = dir(imported(KINDS["strategy"]))
    for name in sorted(name for name in set(dir(strategy)).difference(hooks) if not name.startswith("_")):
        if near := did_you_mean(name, [hook for hook in hooks if not hook.startswith("_")], cutoff=0.85):
            log.warning("strategy: nothing calls %s.%s; %s", strategy.__name__, name, near)


def _check_images(experiment: Experiment, tried: list[Any]) -> None:
    shape = experiment.stream.image_shape
    pair = {**experiment.config["model"], "seed": ANY_SEED}, shape  # the seed changes only the random numbers
    if pair not in tried:
        experiment.model.check_images(shape)
        tried.append(pair)


def _check_output_root(output_root: str) -> None:
    """Check that runs can be written to `output_root`."""
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


def _check_single_classes(experiment: Experiment) -> None:
    """Refuse a softmax over each task's own outputs where some task has only one, as it is constant."""
    if (
        experiment.active_logits == "current"
        and experiment.stream.scenario == "class"
        and 1 in (experiment.stream.task_sizes or [])
    ):
        whose = "" if experiment.trainer.active_logits else f" (the default of {type(experiment.strategy).__name__})"
        raise ConfigError(
            "trainer.active_logits",
            f"expected seen or all where a task has a single class, got current{whose}: nothing would be learned of it",
        )


def _device(name: str) -> "torch.device":
    """The device meant by `name`.

    Raises ConfigError if this machine does not have it.
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
