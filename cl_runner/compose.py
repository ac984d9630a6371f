"""Compose the configurations that a command line asks for."""

import copy
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cl_runner import CONF
from cl_runner.command_line import in_order
from cl_runner.errors import EXPERIMENT_HEAD, ConfigError, did_you_mean
from cl_runner.hydra_keys import RESERVED, refuse_unknown_keys
from cl_runner.overrides import hint_on_quotes, values_of, word_of

VERSION_BASE = "1.3" if hydra.__version__ < "1.4" else None
GRID = "hydra_plugins.cl_runner.sweepers.Grid"  # the sweeper whose jobs are all known in advance
NOT_SWEPT = ("output_root", "rerun", "plugins")


@dataclass(frozen=True)
class Request:
    """A parsed command line: one configuration, or with -m those of a sweep.

    jobs: for each configuration, the overrides that select it alone, and the configuration itself. Unless the sweeper
        is a grid, these are samples of what it may ask for: every choice, and both ends of every interval.
    swept: the keys that take several values in turn.
    hydra: Hydra's own part of the configuration: `launcher`, `sweeper`.
    argv: the command line as Hydra takes it.
    """

    jobs: list[tuple[list[str], DictConfig]]
    swept: list[str]
    hydra: DictConfig
    argv: list[str]
    sweep: bool


def compose_jobs(argv: list[str]) -> list[DictConfig]:
    """Every configuration that a command line (from `in_order`) asks for: one, or with -m the product of its sweeps.

    Raises ConfigError for what Hydra itself would refuse.
    """
    return [cfg for _, cfg in parse(argv).jobs]


def parse(argv: list[str]) -> Request:
    """Parse a command line (from `in_order`) and compose its configurations.

    Raises ConfigError for what Hydra itself would refuse.
    """
    arguments = get_args_parser().parse_args(argv)
    search = _search_path(arguments.config_dir)
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        composer = Composer(search)
        given = composer.parsed(arguments.overrides)
        if not arguments.multirun:
            return _single_run(composer, given, argv)
        return _sweep(composer, given, argv)


def for_hydra(argv: list[str]) -> list[str]:
    """A command line as Hydra accepts it: all of its options first, then the overrides.

    Raises ConfigError for what Hydra itself would refuse.
    """
    accepted, options = parse(in_order(argv)).argv, list(argv)
    overrides = get_args_parser().parse_intermixed_args(argv).overrides
    for word in overrides:
        options.remove(word)
    return [*options, *accepted[len(accepted) - len(overrides) :]]


def knows_all_keys(argv: list[str]) -> bool:
    """Whether Hydra itself, which refuses unknown keys, accepts a command line (from `in_order`)."""
    arguments = get_args_parser().parse_args(argv)
    with initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        try:
            _composed([*_search_path(arguments.config_dir), *arguments.overrides])
        except ConfigError:
            return False
    return True


def _search_path(config_dir: str | None) -> list[str]:
    return [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []


def _single_run(composer: "Composer", given: list[Override], argv: list[str]) -> Request:
    for override in given:
        if override.is_sweep_override():
            key = override.get_key_element()
            quoted = f"; a comma within a value needs quotes that the shell leaves: '{key}=\"a, b\"'"
            raise ConfigError(key, f"a sweep over several values needs -m (--multirun){quoted}")
        if override.key_or_group in ("hydra/launcher", "hydra/sweeper"):
            raise ConfigError(override.key_or_group, "expected -m (--multirun) beside it: it carries out sweeps")
    _check_hydra_keys(composer, given)
    overrides = [word_of(override) for override in given]
    cfg, accepted = composer.as_hydra_takes_it(argv, overrides)
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return Request([(overrides, own)], [], cfg.hydra, accepted, sweep=False)


def _sweep(composer: "Composer", given: list[Override], argv: list[str]) -> Request:
    for override in given:
        if override.is_sweep_override() and (override.is_hydra_override() or override.key_or_group in NOT_SWEPT):
            raise ConfigError(override.key_or_group, "expected one value: it is the same for all jobs of a sweep")
    _check_hydra_keys(composer, given)
    single = [word_of(override) for override in given if not override.is_sweep_override()]
    master, accepted = composer.as_hydra_takes_it(argv, single)
    _refuse_grids_in_a_grid(composer, given, single)
    own = composer.parsed([f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()])
    # The command line takes precedence over an experiment's own grid, key by key.
    keys = {override.get_key_element(): override for override in (*own, *given) if not override.is_hydra_override()}
    if master.hydra.sweeper._target_ == GRID:
        jobs = list(itertools.product(*(list(values_of(override)) for override in keys.values())))
    else:
        jobs = _one_at_a_time([list(values_of(override, ends=True)) for override in keys.values()])
    composed = [(list(job), composer.of_a_sweep(job)) for job in jobs]
    swept = [key for key, override in keys.items() if override.is_sweep_override()]
    return Request(composed, swept, master.hydra, accepted, sweep=True)


def _check_hydra_keys(composer: "Composer", given: list[Override]) -> None:
    keys = [override.key_or_group for override in given if override.key_or_group.startswith("hydra.")]
    if keys:
        others = [each for each in given if not each.is_sweep_override() and each.key_or_group not in keys]
        whole = composer.composed([word_of(override) for override in others], with_hydra=True)
        refuse_unknown_keys(keys, OmegaConf.to_container(whole.hydra, resolve=False))


def _refuse_grids_in_a_grid(composer: "Composer", given: list[Override], single: list[str]) -> None:
    """Refuse a sweep over experiments that hold grids: there is only one product, and theirs would be ignored."""
    for override in given:
        if override.is_choice_sweep() and override.key_or_group == "experiment":
            for word in values_of(override):
                if composer.composed([*single, word], with_hydra=True).hydra.sweeper.get("params"):
                    raise ConfigError(
                        "experiment",
                        f"{word.partition('=')[2]} holds a grid of its own and cannot be swept over: give every "
                        "experiment a command of its own with one output_root, and cl-runner report joins them",
                    )


def _one_at_a_time(values: list[list[str]]) -> list[list[str]]:
    """The first value of every key; then each other value, with the first ones of the other keys."""
    first = [options[0] for options in values]
    others = ((place, other) for place, options in enumerate(values) for other in options[1:])
    return [first, *([*first[:place], other, *first[place + 1 :]] for place, other in others)]


class Composer:
    """Parses and composes overrides; only to be used within `initialize_config_dir`."""

    def __init__(self, search: list[str]) -> None:
        self._search = search
        self._loader = GlobalHydra.instance().config_loader()
        self._groups = set(self._loader.list_groups(""))
        self._chosen: dict[tuple[str, ...], DictConfig] = {}  # choices -> the configuration composed from them alone

    def parsed(self, words: Sequence[str]) -> list[Override]:
        try:
            overrides = OverridesParser.create(config_loader=self._loader).parse_overrides(list(words))
        except HydraException as error:
            raise ConfigError("command line", f"{_first_lines(error)}{hint_on_quotes(words)}") from None
        for override in overrides:
            group = override.key_or_group
            if reserved := next((key for key in RESERVED if group == key or group.startswith(f"{key}.")), None):
                raise ConfigError(group, RESERVED[reserved])
            if group in self._groups and not override.is_sweep_override():
                self._refuse_no_choice(override)
        return overrides

    def _refuse_no_choice(self, override: Override) -> None:
        """Refuse what is no name of a choice (a list, say), and to remove a group from the top level."""
        known = f"expected one of {', '.join(self._loader.get_group_options(override.key_or_group))}"
        if not override.is_delete():
            if not isinstance(value := override.value(), str):
                raise ConfigError(override.key_or_group, f"{known}, got {'null' if value is None else value}")
        elif override.package is None:
            raise ConfigError(override.key_or_group, f"{known}; it cannot be removed")

    def composed(self, words: Sequence[str], with_hydra: bool = False) -> DictConfig:
        """The configuration that the words compose to."""
        return _composed([*self._search, *(lenient(word, self._groups) for word in words)], with_hydra)

    def of_a_sweep(self, words: Sequence[str]) -> DictConfig:
        """The same for one job of many, faster: Hydra composes each combination of choices once, and values are set in
        a copy of the result, as Hydra sets them."""
        values = [word for word in words if _sets_a_value(word, self._groups)]
        chosen = tuple(word for word in words if word not in values)
        if any(word.startswith(("+", "~")) for word in chosen):
            return self.composed(words)
        if chosen not in self._chosen:
            self.parsed(chosen)  # refuses what is no choice
            self._chosen[chosen] = self.composed(chosen)
        cfg = copy.deepcopy(self._chosen[chosen])
        try:
            for override in self.parsed(values):
                OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
        except OmegaConfBaseException:
            return self.composed(words)  # which reports what is wrong in Hydra's words
        return cfg

    def as_hydra_takes_it(self, argv: list[str], single: list[str]) -> tuple[DictConfig, list[str]]:
        """What is not swept over, composed with Hydra's own part, and a command line that Hydra accepts.

        Hydra first composes what is not swept over. There `strategy.batch_size=8` beside a sweep over strategies may
        set a key that the default strategy lacks, and `trainer.first_task.epochs=3` a key below null: such words need
        a ++ in front.
        """
        try:
            return _composed([*self._search, *single], with_hydra=True), argv
        except ConfigError:
            accepted = [word if word.startswith("-") else lenient(word, self._groups) for word in argv]
            return self.composed(single, with_hydra=True), accepted


def lenient(word: str, groups: Collection[str]) -> str:
    """The word with unknown keys allowed: a later check can suggest the nearest valid one, and knows which arguments a
    component takes that its YAML does not list. `groups`: of the configuration."""
    return f"++{word}" if _sets_a_value(word, groups) else word


def _sets_a_value(word: str, groups: Collection[str]) -> bool:
    """Whether a word sets a value, rather than makes a choice, adds or deletes something, or names a folder."""
    key, equals, _ = word.partition("=")
    return (
        bool(equals)
        and not key.startswith(("+", "~", "hydra"))
        and "/" not in key
        and key.partition("@")[0] not in groups
    )


def _composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    try:
        return compose("config", overrides=overrides, return_hydra_config=with_hydra)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
        own = group.removeprefix("experiment/")
        if own != group and (CONF / own).is_dir():
            says = f"expected its defaults to say `override /{own}: {choice}`, got `{own}: {choice}`"
            raise ConfigError("experiment", says) from None
        options = error.options or ["nothing"]
        near = did_you_mean(choice, options, most=3)
        says = "; ".join(filter(None, [f"expected one of {', '.join(options)}, got {choice!r}", near]))
        raise ConfigError(group or "command line", says) from None
    except YAMLError as error:
        raise ConfigError("conf", f"expected YAML, got {' '.join(str(error).split())}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if meant := re.search(r"In '(experiment/\S+)': Could not override '(experiment/)?(\w+)@", str(error)):
            slash = f"expected its defaults to say `override /{meant[3]}: …`, with the slash"
            raise ConfigError(meant[1], slash if meant[2] else EXPERIMENT_HEAD) from None
        raise ConfigError("command line", _first_lines(error)) from None


def _first_lines(error: Exception) -> str:
    """An error's first two lines, and Hydra's advice if a + was forgotten."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join([*lines[:2], *(line for line in lines[2:] if line.startswith("To append"))])
