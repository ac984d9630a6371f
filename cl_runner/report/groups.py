"""Group the runs that repeat one another, and find the keys that tell the groups apart."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from cl_runner.errors import ConfigError, did_you_mean
from cl_runner.identity import display_name, hashed_part
from cl_runner.metrics import forgetting_matrix
from cl_runner.report.runs import LeftOut, Run
from cl_runner.report.statistics import Summary, mean_of_matrices, summarise

TASKS, GROUP = "tasks", "group"  # columns that are no configuration keys: the stream's length, the hash
SEED = "${seed}"  # replaces a value that follows the seed
ABSENT = "–"  # for a component without this key
Settings = dict[str, Any]  # dotted key -> value; a component's own key -> its name
Value = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in the seed or, with --by, in other keys too."""

    values: tuple[Value, ...]  # of its Groups' keys
    runs: list[Run]  # one per seed, by seed

    @property
    def num_tasks(self) -> int:
        return self.runs[0].num_tasks

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def by_seed(self, metric: str) -> dict[int, float | None]:
        return {run.seed: run.metrics.get(metric) for run in self.runs}

    def summary(self, metric: str) -> Summary:
        return summarise(list(self.by_seed(metric).values()))

    @cached_property
    def forgetting(self) -> list[np.ndarray]:
        return [forgetting_matrix(run.accuracy) for run in self.runs]

    @cached_property
    def mean_accuracy(self) -> np.ndarray:
        return mean_of_matrices([run.accuracy for run in self.runs])

    @cached_property
    def mean_forgetting(self) -> np.ndarray:
        """The mean of the seeds' matrices, not the matrix of their mean."""
        return mean_of_matrices(self.forgetting)


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups, in the order of their values."""

    keys: list[str]  # dotted: those in which groups differ; the strategy first
    shared: list[str]  # the configuration's other keys
    groups: list[Group]
    left_out: list[LeftOut]  # runs that repeat another one's work
    pooled: list[str]  # keys in which runs of one group differ

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> list[str]:
        return short_names(self.keys)

    def key(self, name: str, field: str) -> str:
        """The key that `name`, the value of option `field`, refers to.

        Raises ConfigError if there is none, or if groups do not differ in it.
        """
        key = resolve(name, [*self.keys, *self.shared], field, self.keys, "a key in which rows differ")
        if key in self.shared:
            raise ConfigError(field, f"expected a key in which rows differ, got {name!r}; all that have it agree")
        return key

    def value(self, group: Group, key: str) -> Value:
        return group.values[self.keys.index(key)]

    def label(self, group: Group) -> str:
        """Such as "ewc strength=100"."""
        named = zip(self.names[1:], group.values[1:], strict=True)
        said = (f"{name}={shown(value)}" for name, value in named if value != ABSENT)
        return " ".join([shown(group.values[0]), *said])


def group_runs(runs: Sequence[Run], by: Sequence[str] = ()) -> Groups:
    """Group runs by everything but the seed, or by the keys of `by` only.

    Raises ConfigError if a key of `by` is unknown, or if its keys leave two runs of one seed in one group.
    """
    settings = _settings(runs)
    if by:
        return _by_keys(runs, settings, by)
    whole = all(run.groups for run in runs)  # a status may not tell its run's groups
    members: dict[tuple, list[int]] = defaultdict(list)
    for index, (run, own) in enumerate(zip(runs, settings, strict=True)):
        for name in run.groups if whole else [json.dumps(own, sort_keys=True)]:
            members[name, run.num_tasks].append(index)
    keys = ["strategy", *(key for key in _differing(settings) if key != "strategy")]
    keys = [key for key in keys if all(len({settings[i].get(key) for i in own}) == 1 for own in members.values())]
    rows = [[*(settings[own[0]].get(key, ABSENT) for key in keys)] for own in members.values()]
    for key, extra in ((TASKS, [name[1] for name in members]), (GROUP, [str(name[0])[-8:] for name in members])):
        if len({tuple(map(repr, row)) for row in rows}) < len(rows) and len(set(extra)) > 1:
            keys.append(key)
            rows = [[*row, value] for row, value in zip(rows, extra, strict=True)]
    left_out: list[LeftOut] = []
    groups = [
        Group(tuple(row), _one_a_seed([runs[i] for i in own], left_out))
        for row, own in zip(rows, members.values(), strict=True)
    ]
    return Groups(keys, _others(settings, keys), _in_order(groups), left_out, [])


def _by_keys(runs: Sequence[Run], settings: list[Settings], by: Sequence[str]) -> Groups:
    left_out: list[LeftOut] = []
    runs, settings = _distinct(runs, settings, left_out)
    known, differing = _keys(settings), _differing(settings)
    chosen = list(dict.fromkeys(["strategy", *(resolve(key, known, "--by", differing) for key in by)]))
    for key in chosen:
        if all(own.get(key, SEED) == SEED for own in settings):
            raise follows_the_seed("--by", key)
    members: dict[tuple, list[int]] = defaultdict(list)
    for index, (run, own) in enumerate(zip(runs, settings, strict=True)):
        members[*(own.get(key, ABSENT) for key in chosen), run.num_tasks].append(index)
    pooled = {key for own in members.values() for key in _differing([settings[i] for i in own])}
    for values, own in members.items():
        seeds = [runs[i].seed for i in own]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            which = [settings[i] for i in own if runs[i].seed == twice]
            apart = _differing(which) or list(_differing([settings[i] for i in own]))
            raise ConfigError(
                "--by",
                f"expected keys that tell all runs of one seed apart, got {' '.join(chosen)}: {shown(values[0])} has "
                f"seed {twice} {len(which)} times; add {' or '.join(apart)}",
            )
    lengths = {values[-1] for values in members}
    keys = [*chosen, TASKS] if len(lengths) > 1 else chosen
    groups = [
        Group(values[: len(keys)], sorted((runs[i] for i in own), key=_by_seed)) for values, own in members.items()
    ]
    return Groups(keys, _others(settings, keys), _in_order(groups), left_out, sorted(pooled - set(chosen)))


def resolve(
    key: str,
    known: Iterable[str],
    field: str,
    rather: Sequence[str],
    what: str = "a key of the configuration",
) -> str:
    """The dotted key that `key` refers to, in full or by its last parts; if there are several, the one in `rather`.

    Raises ConfigError if there is none, or more than one.
    """
    known = list(known)
    if key in known:
        return key
    ending = [name for name in known if name.endswith(f".{key}")]
    preferred = [name for name in ending if name in rather]
    if key == "seed" and not preferred:
        raise follows_the_seed(field, key)
    found = preferred or ending
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(field, f"expected one key, got {key!r}, which may be {' or '.join(found)}")
    near = did_you_mean(key, [*known, *short_names(known)]) or f"known: {', '.join(rather or known)}"
    raise ConfigError(field, f"expected {what}, got {key!r}; {near}")


def follows_the_seed(field: str, key: str) -> ConfigError:
    return ConfigError(field, f"expected keys that tell rows apart, got {key!r}, the seed over which each is a mean")


def short_names(keys: Sequence[str]) -> list[str]:
    """The last parts of each key that no other key ends with."""

    def short(key: str) -> str:
        parts = key.split(".")
        names = (".".join(parts[-count:]) for count in range(1, len(parts)))
        return next((name for name in names if not any(_ends(other, name) for other in keys if other != key)), key)

    return [short(key) for key in keys]


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def shown(value: Value) -> str:
    """A value as one would type it: 1e4, not 10000.0; null, true."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        mantissa, _, exponent = (f"{value:.5e}" if abs(value) >= 1e4 else text).partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if exponent else text
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def is_number(value: Value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ordering(value: Value) -> tuple[int, float, str]:
    """A sort key: absent values first, then numbers by size, then words alphabetically."""
    if value == ABSENT:
        return (0, 0.0, "")
    if is_number(value):
        return (1, float(value), "")
    return (2, 0.0, shown(value))


def _in_order(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: [ordering(value) for value in group.values])


def _by_seed(run: Run) -> int:
    return run.seed


def _one_a_seed(runs: list[Run], left_out: list[LeftOut]) -> list[Run]:
    """The last finished run of each seed; the others are added to `left_out`."""
    kept: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.finished):
        if earlier := kept.get(run.seed):
            later = ", finished later" if run.finished > earlier.finished else ""
            left_out.append(LeftOut(earlier.folder, "twice", f"{run.folder} is the same work{later}"))
        kept[run.seed] = run
    return sorted(kept.values(), key=_by_seed)


def _distinct(
    runs: Sequence[Run], settings: list[Settings], left_out: list[LeftOut]
) -> tuple[list[Run], list[Settings]]:
    """The runs and their settings, of each piece of work only the last finished; the others join `left_out`."""
    same: dict[tuple, list[Run]] = defaultdict(list)
    for run, own in zip(runs, settings, strict=True):
        same[*sorted(own.items(), key=lambda item: item[0]), run.num_tasks].append(run)
    kept = {run.folder for several in same.values() for run in _one_a_seed(several, left_out)}
    pairs = [(run, own) for run, own in zip(runs, settings, strict=True) if run.folder in kept]
    return [run for run, _ in pairs], [own for _, own in pairs]


def _differing(settings: Sequence[Settings]) -> list[str]:
    """Keys that differ among runs in which the key's own component is the same: memories of one kind, for whatever
    strategy.

    A key that comes with the choice of a component (finetune has no strength) does not count as a difference.
    """

    def component(own: Settings, key: str) -> tuple[str, Value]:
        return next(((part, own[part]) for part in reversed(_above(key)) if part in own), ("", None))

    differing = []
    for key in _keys(settings):
        met: dict[tuple[str, Value], Value] = {}
        for own in settings:
            value = own.get(key, ABSENT)
            if met.setdefault(component(own, key), value) != value:
                differing.append(key)
                break
    return differing


def _keys(settings: Sequence[Settings]) -> list[str]:
    return list(dict.fromkeys(key for own in settings for key in own))


def _others(settings: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    return [key for key in _keys(settings) if key not in keys]


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _settings(runs: Sequence[Run]) -> list[Settings]:
    """For each run, the settings that change its numbers, with SEED in place of values that follow the seed."""
    settings = [dict(_flat(hashed_part(run.config))) for run in runs]
    for own in settings:
        own.pop("seed", None)
    follows = {key: True for own in settings for key, value in own.items() if type(value) is int}
    for run, own in zip(runs, settings, strict=True):
        for key, value in own.items():
            if type(value) is int and value != run.seed:
                follows[key] = False
    fixed = {
        (group, key)
        for run, own in zip(runs, settings, strict=True)
        for key, value in own.items()
        for group in run.groups
        if key.endswith(".seed") and value != run.seed
    }
    for run, own in zip(runs, settings, strict=True):
        for key, value in own.items():
            apart = any((group, key) in fixed for group in run.groups)
            is_seed = key.endswith(".seed") and value == run.seed and not apart
            if is_seed or (type(value) is int and follows[key] and _seeds_differ(runs)):
                own[key] = SEED
    return settings


def _seeds_differ(runs: Sequence[Run]) -> bool:
    return any(run.seed != runs[0].seed for run in runs)


def _flat(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            if "_target_" in value:
                yield name, display_name(name, value)
            yield from _flat(value, name)
        elif key != "_target_":
            yield name, value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
