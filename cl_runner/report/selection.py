"""Select hyper-parameters without test data: by validation accuracy, optionally on the first tasks only."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cl_runner.errors import ConfigError
from cl_runner.report.groups import TASKS, Group, Groups, Value
from cl_runner.report.runs import Run
from cl_runner.report.statistics import Summary, summarise

LOOKS = ("stream.augment", "stream.crop_padding", "stream.normalize", "stream.mean", "stream.std")
ROOM = (".memory.size", ".memory.per")


@dataclass(frozen=True, eq=False)
class Pick:
    """The group with the highest mean validation accuracy among those that share `values`."""

    values: tuple[Value, ...]  # of the keys that the candidates share
    group: Group
    validation: Summary
    candidates: int


def select(groups: Groups, tasks: int | None, within: Sequence[str]) -> tuple[list[Pick], list[str]]:
    """A pick for each strategy (or each value of `within`), and warnings. Test accuracy is never used.

    tasks: use the validation splits of only the first `tasks` tasks, after the last of these was learned; None: all.
    Raises ConfigError if no run has a validation split, or one has fewer tasks.
    """
    if not any(run.is_validated for group in groups for run in group.runs):
        raise ConfigError("--select", "expected runs with a validation split (stream.validation=0.1, say), got none")
    keys = [groups.key(key, "--within") for key in within] or [key for key in groups.keys if _given(key)]
    rivals: dict[tuple[Value, ...], list[Group]] = defaultdict(list)
    for group in groups:
        rivals[tuple(groups.value(group, key) for key in keys)].append(group)
    picks, warnings = [], []
    for values, own in rivals.items():
        scores = {group: _score(group, tasks) for group in own}
        for group in [group for group, score in scores.items() if not score.n]:
            when = f"task {tasks}" if tasks else "the last task"
            warnings.append(f"{groups.label(group)} has no validation accuracy after {when}: it cannot be chosen")
            del scores[group]
        if not scores:
            continue
        shared = set.intersection(*(set(group.seeds) for group in scores))
        fair = len({tuple(group.seeds) for group in scores}) > 1 and shared
        if fair:
            scores = {group: _score(group, tasks, shared) for group in scores}
        best = max(scores, key=lambda group: scores[group].mean)
        if fair:
            seeds = ", ".join(map(str, sorted(shared)))
            warnings.append(f"{groups.label(best)} was chosen by the runs whose seeds all candidates have: {seeds}")
        elif not shared:
            warnings.append(f"{groups.label(best)} was chosen from {len(scores)} groups that have no seed in common")
        if equal := [group for group in scores if scores[group].mean == scores[best].mean and group is not best]:
            others = f"{len(equal)} with the same validation accuracy, {groups.label(equal[0])} among them"
            warnings.append(f"{groups.label(best)} comes before {others}: nothing but their order speaks for it")
        picks.append(Pick(values, best, scores[best], len(scores)))
    return picks, warnings


def validation_accuracy(run: Run, tasks: int | None) -> float | None:
    """Mean over the first `tasks` tasks' validation splits, after the last of these was learned.

    None if no images were set aside, or if it was not measured then: joint training, say, is measured only after the
    last task.
    Raises ConfigError if the run has fewer tasks.
    """
    last = tasks or run.num_tasks
    if last > run.num_tasks:
        raise ConfigError("--tasks", f"expected at most {run.num_tasks}, the tasks of {run.folder}, got {last}")
    if run.validation is not None:
        value = float(run.validation[last - 1, :last].mean())
        return value if math.isfinite(value) else None
    return run.metrics.get("validation_accuracy") if last == run.num_tasks else None


def _given(key: str) -> bool:
    """Whether a key is not up for selection: it defines the task, or the room for memory, or the strategy compared."""
    task = key.partition(".")[0] == "stream" and key not in LOOKS
    return task or key in ("strategy", TASKS) or key.endswith(ROOM)


def _score(group: Group, tasks: int | None, seeds: set[int] | None = None) -> Summary:
    runs = [run for run in group.runs if seeds is None or run.seed in seeds]
    return summarise([validation_accuracy(run, tasks) for run in runs])
