"""Results that papers report, read from the experiments' files, and whether ours agree with them.

A file in conf/experiment/ holds, under `published`, the source of its numbers and a row for each: the overrides that
reproduce it, over how many seeds, and the published value.
"""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cl_runner import CONF
from cl_runner.errors import ConfigError, did_you_mean, suggestion
from cl_runner.ranges import Count

LEAST = 0.5  # tolerance, in points
TIERS = ("cpu", "gpu", "full")  # each includes those before it; `full` adds what needs the user's own weights

Tier = Literal["cpu", "gpu", "full"]


class Value(BaseModel):
    """One published number, in percent.

    sem, n: its standard error, and the number of runs that it is the mean of; sd: their standard deviation, instead of
    sem. tolerance: instead of both, if no error was published; by default the study's.
    cause: why ours differs, if it does and the reason is known.
    """

    model_config = ConfigDict(extra="forbid")

    overrides: list[str]
    value: float
    sem: float | None = None
    sd: float | None = None
    n: Count | None = None
    tolerance: float | None = None
    metric: str | None = None
    seeds: Count | None = None
    tier: Tier | None = None
    cause: str = ""


class Study(BaseModel):
    """The `published` part of an experiment's file, with defaults for its rows."""

    model_config = ConfigDict(extra="forbid")

    source: str
    n: Count  # published runs per number
    seeds: Count  # ours: 1, 2, ...
    tier: Tier = "cpu"
    metric: str = "average_accuracy"
    tolerance: float | None = None  # of rows without an error or a tolerance of their own
    rows: dict[str, Value]


@dataclass(frozen=True)
class Row:
    """A published number, and the runs that should reproduce it."""

    name: str  # <experiment>/<row>
    source: str
    overrides: tuple[str, ...]
    seeds: range
    tier: Tier
    metric: str
    value: float
    sd: float | None  # of one published run
    n: int
    tolerance: float | None
    cause: str

    @property
    def experiment(self) -> str:
        return self.name.partition("/")[0]

    @property
    def sem(self) -> float | None:
        return None if self.sd is None else self.sd / math.sqrt(self.n)

    def allowed(self, runs: int) -> float:
        """How far off a mean of `runs` runs may be: two standard errors of the difference if they spread as the
        published ones do, or the row's tolerance."""
        if self.tolerance is not None:
            return self.tolerance
        assert self.sd is not None
        return max(LEAST, 2 * math.sqrt(self.sd**2 / self.n + self.sd**2 / runs))

    def command(self, seed: int) -> list[str]:
        return [f"experiment={self.experiment}", *self.overrides, f"seed={seed}"]


@dataclass(frozen=True)
class Measured:
    """The results of a row's runs, in percent."""

    row: Row
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sem(self) -> float:
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    @property
    def verdict(self) -> str:
        return "pass" if abs(self.mean - self.row.value) <= self.row.allowed(len(self.values)) else "miss"


def published(folder: Path = CONF / "experiment") -> list[Row]:
    """Every row of every experiment that reproduces published numbers.

    Raises ConfigError for an invalid `published` entry.
    """
    rows = []
    for file in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(file.read_text()).get("published")
        if content is None:
            continue
        try:
            study = Study.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{file.name}: published.{where}", f"{first['msg']}, got {first['input']!r}") from None
        rows += [_row(file.stem, name, study, value) for name, value in study.rows.items()]
    return rows


def _row(experiment: str, name: str, study: Study, value: Value) -> Row:
    n = value.n or study.n
    sd = value.sd if value.sem is None else value.sem * math.sqrt(n)
    tolerance = study.tolerance if value.sem is value.sd is value.tolerance is None else value.tolerance
    if [value.sem, value.sd, tolerance].count(None) != 2:
        raise ConfigError(f"{experiment}.yaml: published.rows.{name}", "expected one of sem, sd and tolerance")
    return Row(
        name=f"{experiment}/{name}",
        source=study.source,
        overrides=tuple(value.overrides),
        seeds=range(1, (value.seeds or study.seeds) + 1),
        tier=value.tier or study.tier,
        metric=value.metric or study.metric,
        value=value.value,
        sd=sd,
        n=n,
        tolerance=tolerance,
        cause=value.cause,
    )


def chosen(rows: Sequence[Row], names: Sequence[str], tier: Tier | None) -> list[Row]:
    """The rows named (an experiment stands for all of its rows), or those of a tier and the tiers below it.

    Raises ConfigError for an unknown name.
    """
    if not names:
        within = TIERS[: TIERS.index(tier or "cpu") + 1]
        return [row for row in rows if row.tier in within]
    found = []
    for name in names:
        named = [row for row in rows if name in (row.name, row.experiment)]
        if not named:
            known = [*dict.fromkeys(row.experiment for row in rows), *(row.name for row in rows)]
            near = _near(name, known) or "cl-runner verify --list names all"
            raise ConfigError("verify", f"expected a row or an experiment, got {name!r}; {near}")
        found += named
    return list(dict.fromkeys(found))


def _near(word: str, names: Sequence[str]) -> str:
    """A hint: names that are similar to the word, or that end with it, or that have a part similar to it."""
    ends = [name for name in names if name.endswith(f"/{word}")]
    if near := did_you_mean(word, names, most=3) or suggestion(ends):
        return near
    parts = {name: re.split("[-_/]", name) for name in names}
    like = get_close_matches(word, {part for own in parts.values() for part in own}, n=1)
    return suggestion([name for name, own in parts.items() if like and like[0] in own][:3])
