"""`cl-runner verify`: reproduce results that papers report, and compare.

A row is run over its seeds in ordinary run folders, so finished runs are not repeated.
"""

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cl_runner.arguments import Parser
from cl_runner.command_line import in_order
from cl_runner.compose import compose_jobs
from cl_runner.errors import ConfigError, in_a_line
from cl_runner.folder import RunFolder, write_atomically
from cl_runner.identity import EXECUTION, run_folder, weights_file
from cl_runner.published import TIERS, Measured, Row, chosen, published

WIDTH = 110  # columns at least, so that a row fits on a line


def main(argv: list[str]) -> int:
    """Exit status: 0 if everything measured passes, 1 if a row misses or a run failed.

    Raises ConfigError.
    """
    arguments = parser().parse_intermixed_args(argv)  # overrides may follow options
    names = [word for word in arguments.words if "=" not in word]
    arguments.overrides = [word for word in arguments.words if "=" in word]
    rows = published()
    console = Console()
    console.width = max(console.width, WIDTH)
    if names and arguments.tier:
        raise ConfigError("--tier", f"expected it, or rows by name, got both: {names[0]!r}")
    if arguments.list:
        _list(chosen(rows, names, arguments.tier or TIERS[-1]), console)
        return 0
    asked = chosen(rows, names, arguments.tier)
    _check(asked, arguments)
    if changes := _changes(arguments.overrides, asked):
        if arguments.write is not None:
            raise ConfigError("--write", f"expected no change of the published protocol, got {' '.join(changes)}")
        console.print(f"not the published protocol: {' '.join(changes)}", style="yellow", highlight=False)
    if arguments.write is not None and arguments.write.exists():
        write(arguments.write, [], rows)  # drop outdated rows now, whatever becomes of the rest
    failed: list[str] = []
    old: list[str] = []
    measured = []
    for row in asked:
        values = list(_values(row, arguments, failed, old))
        if len(values) == len(row.seeds):
            measured.append(Measured(row, tuple(values)))
            _print(measured[-1], console, judged=not changes)
            if arguments.write is not None:  # at once: the next row may take hours, and be stopped
                write(arguments.write, measured, rows)
    if arguments.only_done and len(measured) < len(asked):
        waiting = f"not done: {len(asked) - len(measured)} of {len(asked)} row{'s' * (len(asked) != 1)}"
        console.print(f"{waiting}; without --only-done they are run", highlight=False)
    if arguments.write is not None and not measured:
        console.print(f"nothing to add to {arguments.write}", highlight=False)
    if old:
        runs = f"{len(old)} run was" if len(old) == 1 else f"{len(old)} runs were"
        line = f"{runs} made with other code than is there now: {old[0]}{', …' if len(old) > 1 else ''}"
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    for line in failed:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    return int(bool(failed) or (not changes and any(each.verdict == "miss" for each in measured)))


def parser() -> Parser:
    parser = Parser(prog="cl-runner verify", description="Reproduce results that papers report, and compare.")
    parser.add_argument(
        "words", nargs="*", metavar="ROW|KEY=VALUE", help="EXPERIMENT/ROW, or EXPERIMENT; and overrides for every run"
    )
    parser.add_argument(
        "--tier",
        choices=TIERS,
        help="rows that need no more than this; full: also those whose weights you bring (default: cpu; --list: full)",
    )
    parser.add_argument("--list", action="store_true", help="list the rows and run nothing")
    parser.add_argument("--only-done", action="store_true", help="run nothing: only show rows that are done")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="also write the table to FILE, as Markdown; rows that are in it already stay",
    )
    return parser


def _list(rows: Sequence[Row], console: Console) -> None:
    longest = max(len(row.name) for row in rows)
    head = f"{'row':<{longest}} {'tier':<5} {'%':>6}  overrides of conf/experiment/<experiment>.yaml"
    console.print(head, highlight=False, soft_wrap=True)
    for row in rows:
        says = f"{row.name:<{longest}} {row.tier:<5} {row.value:>6.2f}  {' '.join(row.overrides)}"
        console.print(says, highlight=False, soft_wrap=True)


def _check(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before the first row is run, which may take hours.

    Raises ConfigError.
    """
    from cl_runner.config import validated

    if any(_key(word) == "seed" for word in arguments.overrides):
        raise ConfigError("seed", "expected none: every row runs over seeds of its own")
    if arguments.write is not None:
        _check_table(arguments.write)
    for row in rows:
        if validated(_configuration(row, row.seeds[0], arguments))["rerun"] and arguments.only_done:
            raise ConfigError("rerun", "expected false beside --only-done, which runs nothing")


def _configuration(row: Row, seed: int, arguments: argparse.Namespace) -> Any:
    """A row's configuration. Hydra takes a good part of a second to compose it, so it does so once for all seeds."""
    command = row.command(row.seeds[0])
    cfg = _composed("tracker=local", "output_root=outputs/published", *command, *arguments.overrides).copy()
    cfg.seed = seed
    return cfg


@cache
def _composed(*words: str) -> Any:
    (cfg,) = compose_jobs(in_order([*words]))
    return cfg


def _key(override: str) -> str:
    """What an override sets: `trainer.epochs` of `++trainer.epochs=3`."""
    return override.partition("=")[0].lstrip("+~")


def _changes(overrides: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Those of the overrides that change the published protocol."""

    def of_execution(key: str) -> bool:
        return any(key == path or key.startswith(f"{path}.") for path in EXECUTION)

    def users_to_bring(key: str) -> bool:
        """Whether it is the path of a file of weights that users bring themselves."""
        configurations = (cfg for row in rows for cfg in compose_jobs(row.command(seed=0)))
        return key == "model.pretrained" and all(weights_file(cfg.model.pretrained) for cfg in configurations)

    return [word for word in overrides if not of_execution(_key(word)) and not users_to_bring(_key(word))]


def _values(row: Row, arguments: argparse.Namespace, failed: list[str], old: list[str]) -> Iterator[float]:
    """One value per seed, in percent; a run that fails adds a line to `failed` instead, and one that was done with
    other code adds its name to `old`."""
    from cl_runner.config import check, validated
    from cl_runner.job import carry_out
    from cl_runner.rerun import move_aside, other_code
    from cl_runner.sweep import this_command

    for seed in row.seeds:
        cfg = _configuration(row, seed, arguments)
        config = validated(cfg)
        folder = RunFolder(run_folder(config))
        if config["rerun"] or not folder.done:
            if arguments.only_done:
                return
            try:
                experiment = check(cfg)
                move_aside(experiment)
                carry_out(experiment, this_command())
            except ConfigError as error:  # missing weights, say, which every seed of the row lacks
                failed.append(f"{row.name}: {error}")
                return
            except Exception as error:
                failed.append(f"{row.name} seed={seed}: {in_a_line(error)}")
                continue
        elif other_code(folder):
            old.append(f"{row.name} seed={seed}")
        yield 100 * folder.results["metrics"][row.metric]


def cells(measured: Measured) -> list[str]:
    """A row of the table."""
    row = measured.row
    return [
        *_target(row),
        f"{measured.mean:.2f} ± {measured.sem:.2f}",
        str(len(measured.values)),
        f"{measured.mean - row.value:+.2f}",
        f"{row.allowed(len(measured.values)):.2f}",
        measured.verdict,
    ]


def _target(row: Row) -> list[str]:
    """The cells that say what was published."""
    return [row.name, f"{row.value:.2f}{'' if row.sem is None else f' ± {row.sem:.2f}'}", str(row.n)]


HEADER = """# Published results, reproduced

Mean and standard error over n seeds. A row passes within 2·sqrt(SEM² + SD²/n) of the published value, SEM and SD
published and n ours, at least 0.5 points; where no error was published, within the tolerance that the row's file sets.
Written by `cl-runner verify`; targets are those of the papers and are not moved.
"""
HEADS = ["row", "published, %", "n", "measured, %", "n", "difference", "tolerance", "verdict"]


def _print(measured: Measured, console: Console, judged: bool) -> None:
    """Print a row. `judged`: it was run by the published protocol."""
    verdict = measured.verdict if judged else "none: another protocol"
    table = Table(*HEADS, box=None)
    table.add_row(*cells(measured)[:-1], verdict, style={"pass": "green", "miss": "red"}.get(verdict, "yellow"))
    console.print(table)


def write(path: Path, measured: Sequence[Measured], rows: Sequence[Row]) -> None:
    """Write the table as Markdown, with the command for its rows and the known causes of misses.

    Rows of an earlier table in the file stay if they are not measured anew, unless their published value or tolerance
    has changed: what takes days can be run in parts, and on several machines.
    """
    table = _written(path, rows) | {each.row.name: cells(each) for each in measured}
    there = [row for row in rows if row.name in table]
    lines = [
        HEADER,
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *(f"| {' | '.join(table[row.name])} |" for row in there),
        "",
        "```sh",
        shlex.join(["cl-runner", "verify", *_named(there, rows), "--write", os.path.relpath(path)]),
        "```",
        "",
    ]
    missed = [row for row in there if table[row.name][-1] == "miss" and row.cause]
    if missed:
        lines += ["## What misses, and why", "", *(f"- `{row.name}`: {row.cause}" for row in missed), ""]
    lines += ["## Sources", ""]
    lines += [
        f"- `{experiment}`: {source}" for experiment, source in {row.experiment: row.source for row in there}.items()
    ]
    write_atomically(path, "\n".join(lines) + "\n")


def _check_table(path: Path) -> None:
    """Refuse, before anything is run, to overwrite a file that is not a table of this command's.

    Raises ConfigError.
    """
    if not path.parent.is_dir():
        raise ConfigError("--write", f"expected a file in a folder that is there, got {str(path)!r}")
    if path.exists() and not (path.is_file() and path.read_text().startswith(HEADER.partition("\n")[0])):
        raise ConfigError("--write", f"expected a new file, or a table that verify wrote, got {str(path)!r}")


def _written(path: Path, rows: Sequence[Row]) -> dict[str, list[str]]:
    """The rows of the table in the file that are still valid: name -> cells."""
    if not path.exists():
        return {}
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    found = {line[0]: line for line in lines if len(line) == len(HEADS)}
    return {row.name: found[row.name] for row in rows if row.name in found and _holds(found[row.name], row)}


def _holds(line: list[str], row: Row) -> bool:
    """Whether a table row's target, tolerance and number of runs are still those of the published row."""
    *target, _, runs, _, tolerance, _ = line
    return target == _target(row) and tolerance == f"{row.allowed(int(runs)):.2f}" and int(runs) >= len(row.seeds)


def _named(there: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The arguments that make `verify` choose exactly these rows: an experiment's name for all of its rows."""
    whole = {row.experiment for row in rows} - {row.experiment for row in rows if row not in there}
    return list(dict.fromkeys(row.experiment if row.experiment in whole else row.name for row in there))
