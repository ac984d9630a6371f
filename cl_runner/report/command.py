"""`cl-runner report`: summarise many runs in a table, pictures and a page."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cl_runner.arguments import Parser
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder, write_atomically
from cl_runner.report.groups import group_runs, shown
from cl_runner.report.runs import REPORT, Found, LeftOut, Run, read
from cl_runner.report.selection import Pick, select
from cl_runner.report.table import (
    SPREADS,
    Table,
    legend,
    make_table,
    markdown,
    runs_to_csv,
    said,
    scale_of,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
)
from cl_runner.trackers.names import command_of

MOST_NAMED = 12  # runs left out of the table that the terminal names; the page names all
VALIDATION = "validation_accuracy"
SELECTION = "selection.md"
PICTURES = ("png", "pdf", "svg")
PAGE = "index.html"


def main(argv: list[str]) -> int:
    """Write DIR/report and print its table. Returns the exit status.

    Raises ConfigError.
    """
    asked = parser().parse_args(argv, argparse.Namespace(argv=argv))
    if not asked.select and (asked.tasks or asked.within):
        raise ConfigError("--tasks" if asked.tasks else "--within", "expected together with --select")
    found = read(asked.folder)
    groups = group_runs(found.runs, asked.by)
    curves = [groups.key(key, "--curve") for key in asked.curve]
    table = make_table(groups, asked.metrics, asked.baseline)
    picks, doubts = select(groups, asked.tasks, asked.within) if asked.select else ([], [])
    out = [*found.left_out, *groups.left_out]
    warnings = [*_warnings(table, out), *doubts]
    written = _write(asked, found, table, picks, curves, out, warnings)
    _print(table, asked, picks)
    print(legend(table, asked.spread), file=sys.stderr)
    for line in [*warnings, *_named(out), *_over_seeds(picks, asked.folder)]:
        print(f"cl-runner report: {line}", file=sys.stderr)
    print(f"cl-runner report: {written}", file=sys.stderr)
    return 0


def parser() -> Parser:
    parser = Parser(
        prog="cl-runner report",
        usage="%(prog)s DIR [options]",  # DIR first: an option with several values would swallow it
        description="Write DIR/report/ (index.html; table.csv, .md and .tex; runs.csv; pictures) and print its table. "
        "Runs that differ only in the seed form one row; the columns are the keys in which rows differ.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="an output_root, or a folder above several")
    several = {"nargs": "+", "default": [], "metavar": "KEY"}
    parser.add_argument("--by", help="group by these keys only, e.g. strategy.strength fisher", **several)
    parser.add_argument("--metrics", help="e.g. average_accuracy seconds/train", **{**several, "metavar": "METRIC"})
    parser.add_argument(
        "--spread", nargs="*", choices=list(SPREADS), default=["std"], help="what to show beside a mean (default: std)"
    )
    parser.add_argument(
        "--baseline",
        default="",
        help="differences to it on equal seeds: a strategy, a row's name, or key=value,…",
    )
    parser.add_argument("--curve", help="also draw accuracy over these keys, e.g. strategy.strength", **several)
    parser.add_argument("--pictures", choices=PICTURES, default="png", help="their format (default: png)")
    parser.add_argument(
        "--select", action="store_true", help="name the best group of each strategy by validation accuracy alone"
    )
    parser.add_argument(
        "--tasks",
        type=_count,
        metavar="K",
        help="with --select: judge by the first K tasks alone, after the K-th",
    )
    parser.add_argument(
        "--within",
        help="with --select: name the best group for each value of these keys, instead of for each strategy",
        **several,
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tasks, got {text!r}")
    return int(text)


def _warnings(table: Table, out: Sequence[LeftOut]) -> list[str]:
    warnings = []
    if out:
        states = Counter(run.state for run in out)
        said_states = ", ".join(f"{count} {state}" for state, count in states.items())
        warnings.append(f"{len(out)} {'run is' if len(out) == 1 else 'runs are'} not in the table: {said_states}")
    if table.groups.pooled:
        warnings.append(f"rows hold runs that also differ in {', '.join(table.groups.pooled)}")
    if mixed := [group for group in table.groups if _differ(group.runs)]:
        whose = f"{len(mixed)} of {len(table.groups)} rows, {table.groups.label(mixed[0])} among them"
        warnings.append(f"the runs of {whose}, were made on different images, or with different code")
    if alone := [group for group in table.groups if table.baseline and group not in table.baselines]:
        agrees = f"no {table.baseline} agrees in all other keys with"
        warnings.append(f"{agrees} {len(alone)} of {len(table.groups)} rows, {table.groups.label(alone[0])} among them")
    return warnings


def _differ(runs: Sequence[Run]) -> bool:
    """Whether two runs were made on different images, or with different code of the same module."""
    names = {name for run in runs for name in run.beside}
    return any(len({run.beside[name] for run in runs if name in run.beside}) > 1 for name in names)


def _named(out: Sequence[LeftOut]) -> list[str]:
    lines = [f"  {run.state:<8} {run.folder}" + (f": {run.why}" if run.why else "") for run in out[:MOST_NAMED]]
    return [*lines, f"  and {len(out) - MOST_NAMED} more"] if len(out) > MOST_NAMED else lines


def _over_seeds(picks: Sequence[Pick], folder: Path) -> list[str]:
    """The commands that run what was selected over more seeds, on all training images, in a folder beside this one."""
    own = {"seed": "range(0,5)", "stream.validation": "0", "output_root": f"{folder}-chosen"}
    lines = []
    for pick in picks:
        paths = [folder / run.folder for run in pick.group.runs]
        commands = [command_of(path, RunFolder(path).status.get("command", "")) for path in paths]
        if given := next(filter(None, commands), ""):
            kept = [word for word in shlex.split(given)[1:] if word.lstrip("+").partition("=")[0] not in own]
            words = ["cl-runner", "-m", *kept, *(f"{key}={value}" for key, value in own.items())]
            lines.append(f"over more seeds: {shlex.join(words)}")
    return lines


def _write(
    asked: argparse.Namespace,
    found: Found,
    table: Table,
    picks: Sequence[Pick],
    curves: Sequence[str],
    out: Sequence[LeftOut],
    warnings: Sequence[str],
) -> str:
    """Write the report's files. Returns a line that says what was written where."""
    from cl_runner.report import page, pictures  # matplotlib: not before everything is checked
    from cl_runner.trackers.drawing import drawn

    folder = asked.folder / REPORT
    below = legend(table, asked.spread)
    contents: dict[str, str | bytes] = {
        "table.csv": to_csv(table),
        "runs.csv": runs_to_csv(table.groups),
        "table.md": to_markdown(table, asked.spread) + _notes([below, *warnings], out),
        "table.tex": to_latex(table, asked.spread),
    }
    if picks:
        contents[SELECTION] = f"{markdown(*_selection(picks, asked, table))}\n{below}\n"
    for name, figure in pictures.draw(table.groups, curves, (asked.spread or ["std"])[0]):
        contents[f"{name}.{asked.pictures}"] = drawn(figure, asked.pictures)
    runs, groups = len({run.folder for group in table.groups for run in group.runs}), len(table.groups)
    grouped = f"in {groups} group{'s' * (groups != 1)}"
    contents[PAGE] = page.make_page(
        table,
        title=asked.folder.resolve().name,
        summary=f"{runs} run{'s' * (runs != 1)} {grouped} · cl-runner report {shlex.join(asked.argv)}",
        out=out,
        warnings=warnings,
        file_names=list(contents),
        picked=[pick.group for pick in picks],
        curve=curves[0] if curves else None,
    )
    try:
        folder.mkdir(exist_ok=True)
        earlier = (folder / PAGE).read_text() if (folder / PAGE).exists() else ""
        for name, content in contents.items():
            write_atomically(folder / name, content)
        for old in (*folder.glob(SELECTION), *folder.glob(f"*.{asked.pictures}")):
            if old.name not in contents and f'"{old.name}"' in earlier:  # from a report on other runs or keys
                old.unlink()
    except OSError as error:
        raise ConfigError("DIR", f"expected a folder that can be written, got {str(folder)!r} ({error})") from None
    return f"{runs} of {runs + len(out)} runs {grouped}: {folder / PAGE}"


def _print(table: Table, asked: argparse.Namespace, picks: Sequence[Pick]) -> None:
    console = Console()
    if console.is_terminal:
        console.print(to_rich(table.heads(), table.cells(asked.spread), len(table.groups.keys)))
    else:
        print(to_markdown(table, asked.spread), end="")
    if not picks:
        return
    heads, rows = _selection(picks, asked, table)
    print()
    if console.is_terminal:
        console.print(to_rich(heads, rows, len(table.groups.keys)))
    else:
        print(markdown(heads, rows), end="")


def _selection(picks: Sequence[Pick], asked: argparse.Namespace, table: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what was selected, by what score, from how many, and how it does on the test sets."""
    scale = scale_of(VALIDATION, [pick.validation for pick in picks])
    groups, spread = table.groups, asked.spread
    first = f" of the first {asked.tasks}" if asked.tasks else ""
    measured = dict(zip(groups, table.cells(spread), strict=True))
    keys = len(groups.keys)
    heads = [*groups.names, f"{VALIDATION}{first} (%)", "chosen from", *table.heads()[keys:]]
    rows = [
        [
            *map(shown, pick.group.values),
            said(pick.validation, scale, spread),
            str(pick.candidates),
            *measured[pick.group][keys:],
        ]
        for pick in picks
    ]
    return heads, rows


def _notes(warnings: Sequence[str], out: Sequence[LeftOut]) -> str:
    lines = [f"{warning[0].upper()}{warning[1:].removesuffix('.')}." for warning in warnings]
    named = [f"- {run.state}: {run.folder}" + (f" ({run.why})" if run.why else "") for run in out]
    return "".join(f"\n{line}\n" for line in lines) + ("\n" + "\n".join(named) + "\n" if named else "")
