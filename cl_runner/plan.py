"""What a command is going to do: its jobs, each once, and what is to be said before they begin."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cl_runner.compose import GRID, Request
from cl_runner.config import Experiment
from cl_runner.folder import RunFolder
from cl_runner.rerun import (
    is_made_again,
    join,
    move_aside,
    other_code,
    other_images,
    refuse_halves,
    refuse_if_running,
)
from cl_runner.sweep import Job, Sweep, this_command


def planned(request: Request, experiments: Sequence[Experiment]) -> Sweep:
    """The jobs of a command; those of a search are not known yet. Nothing is written or moved.

    Raises ConfigError as `refuse_halves` does, and FolderInUseError for a run in progress that is to start over, or
    that was asked for alone.
    """
    sweep = Sweep(
        Path(experiments[0].config["output_root"]),
        this_command(),
        grows=request.sweep and request.hydra.sweeper._target_ != GRID,
    )
    if not sweep.grows:
        pairs = zip(request.jobs, experiments, strict=True)
        overrides = {experiment.folder: words for (words, _), experiment in pairs}
        for experiment in _once(experiments):
            if experiment.config["rerun"] or not request.sweep:
                refuse_if_running(experiment)
            if not is_made_again(experiment):
                refuse_halves(experiment)
            sweep.jobs.append(Job(overrides[experiment.folder], experiment.folder.name, experiment.hash))
    return sweep


def remarks(sweep: Sweep, experiments: Sequence[Experiment]) -> Iterator[str]:
    """Lines on jobs that are done but would not be the same now, and on those that compute what others do."""
    if sweep.grows:
        return
    kept = [each for each in _once(experiments) if RunFolder(each.folder).done and not is_made_again(each)]
    if old := [each for each in kept if other_images(each) or other_code(RunFolder(each.folder))]:
        one = f"such as {old[0].folder.name}, whose own command says more"
        yield f"{len(old)} of {len(sweep.jobs)} jobs were done with other images or code than are there now, {one}"
    if same := len(experiments) - len(sweep.jobs):
        yield f"{same} of {len(experiments)} jobs compute what another one computes: they are run once"


def foretold(sweep: Sweep, experiments: Sequence[Experiment]) -> Iterator[str]:
    """Lines that say what the command would do: how many jobs are in each state, then each that is not done."""
    if sweep.grows:
        yield "a search, whose jobs are chosen as it goes"
        return
    yield from remarks(sweep, experiments)
    yield from sweep.summary(afresh={each.folder.name for each in experiments if is_made_again(each)})


def begin(sweep: Sweep, experiments: Sequence[Experiment]) -> None:
    """Write the plan, with the earlier runs moved aside that are to start over."""
    if not sweep.grows:
        for experiment in _once(experiments):
            move_aside(experiment)
    for experiment in experiments:  # also those that compute what another one computes
        join(experiment)
    sweep.write()


def _once(experiments: Sequence[Experiment]) -> list[Experiment]:
    """One experiment for each folder."""
    return list({experiment.folder: experiment for experiment in experiments}.values())
