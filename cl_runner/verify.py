"""`cl-runner verify`: run what papers report, and put what we measure beside it.

An experiment's file in conf/experiment/ holds, under `published`, where its numbers come from and a row for each of
them. A row is run over its seeds like any other sweep, so that what is done is not done again.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from cl_runner.compose import CONF, compose_jobs, in_order
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder, write_atomically

LEAST = 0.5  # tolerance, in points
TIERS = ("cpu", "gpu", "full")  # each holds those before it; `full` also what needs weights of the user's

Tier = Literal["cpu", "gpu", "full"]


class Value(BaseModel):
    """One published number, in percent.

    sem, n: its standard error and over how many runs it is a mean; sd: their standard deviation instead of the former.
    tolerance: where no error was published.
    cause: why ours differs, if it does and is known.
    """

    model_config = ConfigDict(extra="forbid")

    overrides: list[str]
    value: float
    sem: float | None = None
    sd: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    tolerance: float | None = None
    metric: str | None = None
    seeds: Annotated[int, Field(ge=1)] | None = None
    tier: Tier | None = None
    cause: str = ""


class Study(BaseModel):
    """The `published` part of an experiment's file; what it sets holds for rows that do not set it themselves."""

    model_config = ConfigDict(extra="forbid")

    source: str
    n: Annotated[int, Field(ge=1)]  # published runs a number
    seeds: Annotated[int, Field(ge=1)]  # ours: 1, 2, ...
    tier: Tier = "cpu"
    metric: str = "average_accuracy"
    rows: dict[str, Value]


@dataclass(frozen=True)
class Row:
    """A published number and the runs that are to reproduce it."""

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
    def sem(self) -> float | None:
        return None if self.sd is None else self.sd / math.sqrt(self.n)

    def allowed(self, runs: int) -> float:
        """How far a mean of so many runs may be off: two standard errors of the difference, or what the row says."""
        if self.tolerance is not None:
            return self.tolerance
        assert self.sd is not None
        return max(LEAST, 2 * math.sqrt(self.sd**2 / self.n + self.sd**2 / runs))

    def command(self, seed: int) -> list[str]:
        return [f"experiment={self.name.partition('/')[0]}", *self.overrides, f"seed={seed}"]


@dataclass(frozen=True)
class Measured:
    """What the runs of a row gave, in percent."""

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
    """Every row of every experiment that reproduces something.

    Raises ConfigError for a file that says it wrongly.
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
    if (sd is None) == (value.tolerance is None):
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
        tolerance=value.tolerance,
        cause=value.cause,
    )


def chosen(rows: Sequence[Row], names: Sequence[str], tier: Tier | None) -> list[Row]:
    """Those named (a row, or an experiment for all of its rows), or those of a tier and the tiers below it.

    Raises ConfigError for a name that does not exist.
    """
    if not names:
        within = TIERS[: TIERS.index(tier or "cpu") + 1]
        return [row for row in rows if row.tier in within]
    found = []
    for name in names:
        named = [row for row in rows if name in (row.name, row.name.partition("/")[0])]
        if not named:
            raise ConfigError("verify", f"expected rows among {', '.join(row.name for row in rows)}, got {name!r}")
        found += named
    return list(dict.fromkeys(found))


def main(argv: list[str]) -> int:
    """Exit status: 0 all that was measured passes, 1 something misses or a run failed."""
    arguments = _arguments(argv)
    names = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word]
    rows = published()
    console = Console()
    if arguments.list:
        for row in rows:
            console.print(f"{row.name:<44} {row.tier:<5} {row.value:>6.2f}  {' '.join(row.overrides)}", highlight=False)
        return 0
    failed: list[str] = []
    measured = []
    for row in chosen(rows, names, arguments.tier):
        values = list(_values(row, arguments, failed))
        if len(values) == len(row.seeds):
            measured.append(Measured(row, tuple(values)))
            _print(measured[-1:], console)
    if arguments.write is not None:
        write(arguments.write, measured)
    for line in failed:
        console.print(line, style="red", highlight=False)
    return int(bool(failed) or any(each.verdict == "miss" for each in measured))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cl-runner verify", description="run what papers report, and put what we measure beside it")
    parser.add_argument(
        "words", nargs="*", metavar="ROW|KEY=VALUE", help="EXPERIMENT/ROW, or EXPERIMENT; and overrides for every run"
    )
    parser.add_argument("--tier", choices=TIERS, help="all rows that need no more than this (default: cpu)")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only-done", action="store_true", help="run nothing: look at the rows that are done")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table to FILE, as Markdown")
    return parser.parse_args(argv)


def _values(row: Row, arguments: argparse.Namespace, failed: list[str]) -> Iterator[float]:
    """A value a seed, in percent; a run that fails is named in `failed` and has none."""
    from cl_runner.config import check
    from cl_runner.job import carry_out

    for seed in row.seeds:
        overrides = ["tracker=local", "output_root=outputs/published", *row.command(seed), *arguments.overrides]
        (cfg,) = compose_jobs(in_order(overrides))
        experiment = check(cfg)
        folder = RunFolder(experiment.folder)
        if not folder.done:
            if arguments.only_done:
                return
            try:
                carry_out(experiment)
            except Exception as error:
                failed.append(f"{row.name} seed={seed}: {type(error).__name__}: {error}")
                continue
        yield 100 * folder.results["metrics"][row.metric]


def cells(measured: Measured) -> list[str]:
    """A line of the table."""
    row = measured.row
    error = "" if row.sem is None else f" ± {row.sem:.2f}"
    return [
        row.name,
        f"{row.value:.2f}{error}",
        str(row.n),
        f"{measured.mean:.2f} ± {measured.sem:.2f}",
        str(len(measured.values)),
        f"{measured.mean - row.value:+.2f}",
        f"{row.allowed(len(measured.values)):.2f}",
        measured.verdict,
    ]


HEADER = """# Published results, reproduced

Mean and standard error over n seeds. A row passes within 2·sqrt(SEM² + SD²/n) of the published value, SEM and SD
published and n ours, at least 0.5 points; where no error was published, within the tolerance that the row's file sets.
Written by `cl-runner verify`; targets are those of the papers and are not moved.
"""
HEADS = ["row", "published, %", "n", "measured, %", "n", "difference", "tolerance", "verdict"]


def _print(measured: Sequence[Measured], console: Console) -> None:
    table = Table(*HEADS, box=None)
    for each in measured:
        table.add_row(*cells(each), style="green" if each.verdict == "pass" else "red")
    console.print(table)


def write(path: Path, measured: Sequence[Measured]) -> None:
    """The table in Markdown, what each row was run by, and why what misses does."""
    lines = [
        HEADER,
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *(f"| {' | '.join(cells(each))} |" for each in measured),
        "",
        "```sh",
        f"cl-runner verify {' '.join(each.row.name for each in measured)} --write benchmarks/PUBLISHED.md",
        "```",
        "",
    ]
    missed = [each.row for each in measured if each.verdict == "miss" and each.row.cause]
    if missed:
        lines += ["## What misses, and why", "", *(f"- `{row.name}`: {row.cause}" for row in missed), ""]
    lines += ["## Sources", ""]
    sources = dict.fromkeys((each.row.name.partition("/")[0], each.row.source) for each in measured)
    lines += [f"- `{experiment}`: {source}" for experiment, source in sources]
    write_atomically(path, "\n".join(lines) + "\n")
