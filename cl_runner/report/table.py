"""Show groups as a table: on the terminal, as CSV, Markdown or LaTeX."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.table import Table as RichTable
from rich.text import Text

from cl_runner.errors import ConfigError, hint
from cl_runner.report.groups import ABSENT, Group, Groups, Value, is_number, shown
from cl_runner.report.statistics import Summary, paired_difference
from cl_runner.trackers.names import is_share

DEFAULT_METRICS = ("average_accuracy", "average_forgetting", "drift_agreement", "drift_kl", "seconds")
SPREADS = {  # what may be shown beside a mean
    "std": " ± standard deviation over seeds",
    "sem": " ± standard error",
    "interval": " [Student's 95 % interval]",
}
Baselines = dict[Group, Group]  # group -> the one it is compared with; itself for a baseline


@dataclass(frozen=True)
class Scale:
    """How a metric's numbers are formatted."""

    factor: float
    unit: str
    digits: int

    def text(self, value: float, sign: str = "-") -> str:
        """A number, formatted; `sign` is "+" for a difference."""
        if math.isnan(value):
            return "–"
        rounded = round(self.factor * value, self.digits) + 0.0  # never minus zero
        return f"{rounded:{sign}.{self.digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Cell:
    """One metric of one group."""

    summary: Summary
    difference: Summary | None  # to the baseline; None without one, or for the baseline itself


@dataclass(frozen=True)
class Table:
    """Numbers and their formats; `rows` are in the order of `groups`."""

    groups: Groups
    metrics: list[str]
    scales: dict[str, Scale]
    rows: list[dict[str, Cell]]
    baseline: str  # as given on the command line; empty for none
    baselines: Baselines

    def heads(self) -> list[str]:
        """Column heads, for people."""
        heads = list(self.groups.names)
        for metric in self.metrics:
            heads.append(f"{metric} ({self.scales[metric].unit})" if self.scales[metric].unit else metric)
            if self.baseline:
                heads.append(f"Δ to {self.baseline}")
        return [*heads, "n"]

    def cells(self, spread: Sequence[str]) -> list[list[str]]:
        """Cells for people, one row per group: means with the kinds of spread in `spread`."""
        rows = []
        for group, row in zip(self.groups, self.rows, strict=True):
            cells = [shown(value) for value in group.values]
            for metric, cell in row.items():
                scale = self.scales[metric]
                missing = f" (n={cell.summary.n})" if 0 < cell.summary.n < len(group.runs) else ""
                cells.append(said(cell.summary, scale, spread) + missing)
                if self.baseline:
                    cells.append(said_difference(cell.difference, scale))
            rows.append([*cells, str(len(group.runs))])
        return rows


def make_table(groups: Groups, metrics: Sequence[str] = (), baseline: str = "") -> Table:
    """The table of these groups. Raises ConfigError if a metric is unknown, or the baseline missing or ambiguous."""
    chosen = _metrics(groups, metrics)
    baselines = find_baselines(groups, baseline) if baseline else {}
    rows = [{metric: _cell(group, metric, baselines.get(group)) for metric in chosen} for group in groups]
    scales = {metric: scale_of(metric, [row[metric].summary for row in rows]) for metric in chosen}
    return Table(groups, chosen, scales, rows, baseline, baselines)


def _cell(group: Group, metric: str, baseline: Group | None) -> Cell:
    if baseline is None or baseline is group:
        return Cell(group.summary(metric), None)
    difference = paired_difference(group.by_seed(metric), baseline.by_seed(metric))
    return Cell(group.summary(metric), difference)


def _metrics(groups: Groups, asked: Sequence[str]) -> list[str]:
    """The metrics asked for, or by default the usual ones that any run has."""
    runs = [run for group in groups for run in group.runs]
    known = dict.fromkeys(metric for run in runs for metric in run.metrics)
    for metric in asked:
        if metric not in known:
            near = hint(metric, known, most=3)
            raise ConfigError("--metrics", f"expected metrics of the runs, got {metric!r}; {near}")
    usual = [metric for metric in DEFAULT_METRICS if any(run.metrics.get(metric) is not None for run in runs)]
    return list(dict.fromkeys(asked)) or usual or [DEFAULT_METRICS[0]]


def scale_of(metric: str, summaries: Sequence[Summary]) -> Scale:
    """Percent for shares; enough digits to show the spread."""
    if metric.startswith("peak_memory"):
        return Scale(1e-6, "MB", 0)
    means = [abs(summary.mean) for summary in summaries if summary.n]
    if is_share(metric):
        visible = not any(1e-9 < summary.std < 5e-4 for summary in summaries)  # below: rounding
        return Scale(100, "%", 1 if visible else 2)
    largest = max(means, default=0.0)
    if 0 < largest < 0.1:
        return Scale(1, "", 1 - math.floor(math.log10(largest)))
    return Scale(1, "", 0 if largest >= 100 else 1 if largest >= 30 else 2)


def said(summary: Summary, scale: Scale, spread: Sequence[str]) -> str:
    """Such as "95.8 ± 1.0 [93.3, 98.3]"."""
    text = scale.text(summary.mean)
    if summary.n < 2:
        return text
    for kind in ("std", "sem"):
        if kind in spread:
            text += f" ± {scale.text(getattr(summary, kind))}"
    return f"{text} {said_interval(summary, scale)}" if "interval" in spread else text


def said_difference(difference: Summary | None, scale: Scale) -> str:
    """Such as "+4.3 [2.1, 6.5] (3)"."""
    if difference is None:
        return ""
    text = scale.text(difference.mean, sign="+")
    return (
        f"{text} {said_interval(difference, scale)} ({difference.n})"
        if difference.n > 1
        else f"{text} ({difference.n})"
    )


def said_interval(summary: Summary, scale: Scale) -> str:
    return f"[{scale.text(summary.low)}, {scale.text(summary.high)}]"


def legend(table: Table, spread: Sequence[str]) -> str:
    """What a table's cells show, for people."""
    beside = "".join(words for kind, words in SPREADS.items() if kind in spread)
    differences = f"; Δ: mean difference to {table.baseline} on equal seeds [its 95 % interval] (pairs)"
    return f"Mean{beside} of n runs (fewer where n= is given){differences if table.baseline else ''}."


def find_baselines(groups: Groups, asked: str) -> Baselines:
    """The group that each one is compared with; `asked` is a group's label, a strategy, or key=value,...

    If several groups match `asked`, each group is compared with the one that agrees with it in all other keys.
    Raises ConfigError if no group matches, or all do, or several for one group.
    """
    labelled = [group for group in groups if groups.label(group) == asked] if " " in asked else []
    wanted = {} if labelled else _wanted(groups, asked)
    meant = labelled or [
        group for group in groups if all(_is(groups.value(group, key), value) for key, value in wanted.items())
    ]
    if not meant:
        raise _no_group(groups, asked)
    if len(groups) > 1 and len(meant) == len(groups):
        raise ConfigError("--baseline", f"expected a row that others differ from, got {asked!r}, which all rows are")
    others = [key for key in groups.keys if not any(key == own or key.startswith(f"{own}.") for own in wanted)]
    found: Baselines = {}
    for group in groups:
        fitting = meant
        if len(meant) > 1:
            fitting = [
                one for one in meant if group is one or (group not in meant and _agree(groups, others, group, one))
            ]
        if len(fitting) > 1:
            labels = [groups.label(one) for one in fitting]
            raise ConfigError(
                "--baseline", f"expected one group, got {asked!r}, which may be any of: {_listed(labels)}"
            )
        if fitting and fitting[0].num_tasks == group.num_tasks:
            found[group] = fitting[0]
    return found


def _no_group(groups: Groups, asked: str) -> ConfigError:
    there = dict.fromkeys(groups.label(group) for group in groups)
    return ConfigError("--baseline", f"expected one of the groups, got {asked!r}; there are: {_listed(there)}")


def _wanted(groups: Groups, asked: str) -> dict[str, str]:
    """Key -> value: {"strategy": "finetune"} for "finetune", or as in "strategy=ewc,strength=100"."""
    wanted = {}
    for part in asked.split(","):
        name, _, value = part.rpartition("=")
        if " " in name.strip():  # a label, such as "ewc strength=100", but of no group
            raise _no_group(groups, asked)
        key = groups.key(name.strip(), "--baseline") if name else "strategy"
        if key in wanted:
            raise ConfigError("--baseline", f"expected one value of {key}, got {asked!r}")
        wanted[key] = value.strip()
    return wanted


def _is(value: Value, wanted: str) -> bool:
    """Whether a value is the one given as text; 1e4 is 10000.0."""
    if is_number(value):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return shown(value) == wanted


def _agree(groups: Groups, keys: Iterable[str], one: Group, other: Group) -> bool:
    pairs = [(groups.value(one, key), groups.value(other, key)) for key in keys]
    return all(value == its or ABSENT in (value, its) for value, its in pairs)


def _listed(labels: Iterable[str], most: int = 8) -> str:
    labels = list(labels)
    return "; ".join(labels[:most]) + (f"; and {len(labels) - most} more" if len(labels) > most else "")


def to_csv(table: Table) -> str:
    """All numbers, unrounded and in their own units (an accuracy is between 0 and 1)."""
    parts: dict[str, Callable[[Summary], float]] = {
        "": lambda summary: summary.mean,
        "_std": lambda summary: summary.std,
        "_sem": lambda summary: summary.sem,
        "_low": lambda summary: summary.low,
        "_high": lambda summary: summary.high,
    }
    heads = [*table.groups.keys, "n", "seeds"]
    for metric in table.metrics:
        heads += [f"{metric}{part}" for part in parts]
        if table.baseline:
            heads += [f"{metric}_difference{part}" for part in parts] + [f"{metric}_pairs"]
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    nothing = Summary(0, *[math.nan] * 5)
    for group, row in zip(table.groups, table.rows, strict=True):
        line = [*_settings(group), len(group.runs), " ".join(map(str, group.seeds))]
        for cell in row.values():
            line += [_number(part(cell.summary)) for part in parts.values()]
            if table.baseline:
                difference = cell.difference or nothing
                line += [*(_number(part(difference)) for part in parts.values()), difference.n]
        writer.writerow(line)
    return file.getvalue()


def runs_to_csv(groups: Groups) -> str:
    """One row per run with all of its metrics, for statistical tests and plots of one's own."""
    metrics = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics))
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*groups.keys, "seed", "folder", *metrics])
    for group in groups:
        for run in group.runs:
            numbers = (run.metrics.get(name) for name in metrics)
            own = ("" if number is None else repr(number) for number in numbers)
            writer.writerow([*_settings(group), run.seed, run.folder, *own])
    return file.getvalue()


def _settings(group: Group) -> list[str]:
    """The group's values, empty where its components lack the key: a column of numbers stays one."""
    return ["" if value == ABSENT else shown(value) for value in group.values]


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def to_markdown(table: Table, spread: Sequence[str]) -> str:
    return markdown(table.heads(), table.cells(spread))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(heads) + "|---" * len(heads) + "|\n" + "".join(map(line, rows))


def to_latex(table: Table, spread: Sequence[str]) -> str:
    r"""A tabular with booktabs rules, for \input."""
    keys = len(table.groups.keys)
    heads = table.heads()

    def line(cells: Iterable[str]) -> str:
        return " & ".join(map(_tex, cells)) + r" \\" + "\n"

    body = "".join(map(line, table.cells(spread)))
    columns = "l" * keys + "r" * (len(heads) - keys)
    return (
        f"% needs \\usepackage{{booktabs}}\n% {legend(table, spread)}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(heads)}"
        f"\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


_TEX: Mapping[int, str] = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "Δ": r"$\Delta$",
    }
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def to_rich(heads: Sequence[str], rows: Iterable[Sequence[str]], keys: int) -> RichTable:
    """A table for the terminal: the first `keys` columns left-aligned, intervals dimmed below their means."""
    rich = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, head in enumerate(heads):
        rich.add_column(head.replace(" (", "\n("), justify="left" if index < keys else "right", overflow="fold")
    for cells in rows:
        rich.add_row(*map(Text, cells[:keys]), *map(_two_lines, cells[keys:]))
    return rich


def _two_lines(cell: str) -> Text:
    mean, bracket, interval = cell.partition(" [")
    return Text(mean).append(f"\n[{interval}", "dim") if bracket else Text(mean)
