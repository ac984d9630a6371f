"""A run that is asked for again: show it, move it aside, or refuse it if it cannot resume."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_runner.checkpoint import FOLDER as CHECKPOINTS
from cl_runner.config import Experiment
from cl_runner.environment import differences, environment
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.lock import FolderInUseError
from cl_runner.sources import changed
from cl_runner.trackers.console import make_console, show_results


def shown_if_done(experiment: Experiment) -> bool:
    """Show the run if it is done. Returns whether it is.

    Raises ConfigError as `refuse_halves` does.
    """
    refuse_halves(experiment)
    done = RunFolder(experiment.folder).done
    if done:
        join(experiment)
        show(experiment)
    return done


def join(experiment: Experiment) -> None:
    """Add a finished run to this experiment's group.

    A run can be in several: with `stream.seed=0` the run of seed 0 is the same as without it, and the others are not.
    """
    folder = RunFolder(experiment.folder)
    groups = folder.status.get("groups") or []
    if folder.done and experiment.group not in groups:
        with folder.locked():
            folder.update_status(groups=[*groups, experiment.group])


def refuse_if_running(experiment: Experiment) -> None:
    """Raises FolderInUseError if another process is running the experiment."""
    if holder := RunFolder(experiment.folder).held:
        raise FolderInUseError(experiment.folder, holder)


def refuse_halves(experiment: Experiment) -> None:
    """Refuse to resume a run with other images or other code: its results would mix the two.

    Raises ConfigError if an unfinished run was begun on other images than are there now, or saved with other code.
    """
    folder = RunFolder(experiment.folder)
    if folder.done:
        return
    halves = [f"begun with {images}" for images in other_images(experiment)]
    if (folder.path / CHECKPOINTS).exists():
        halves += [f"saved with {code}" for code in other_code(folder)]
    if halves:
        way_out = "go back to those to resume it, or delete the folder to begin anew"
        raise ConfigError(str(experiment.folder), f"was {', and '.join(halves)}; {way_out}")


def other_images(experiment: Experiment) -> list[str]:
    """A phrase for a folder of images (no part of a run's hash) that has changed since the run began, or nothing."""
    then = RunFolder(experiment.folder).status.get("images")
    now = experiment.stream.contents(experiment.config["data_root"]) if then else None
    place = Path(experiment.config["data_root"]) / experiment.config["stream"]["name"]
    return [f"other images than are in {place} now"] if now and then != now else []


def other_code(folder: RunFolder) -> list[str]:
    """A phrase for plugins and components whose code has changed since the run began, or nothing."""
    names = changed(folder.status.get("code") or {})
    return [f"other code of {', '.join(names)} than is there now"] if names else []


def is_made_again(experiment: Experiment) -> bool:
    """Whether the run is to start over: with rerun=true, or if it failed and its code has been changed since."""
    return experiment.config["rerun"] or bool(_failed_with(RunFolder(experiment.folder)))


def move_aside(experiment: Experiment) -> None:
    """Move a run aside that is to start over.

    Raises FolderInUseError with rerun=true if another process is running it.
    """
    if experiment.config["rerun"]:
        _keep_earlier(RunFolder(experiment.folder))
    else:
        move_aside_if_mended(experiment.folder)


def move_aside_if_mended(path: Path) -> None:
    """Move a run aside that failed, if its code, whose fault it may have been, has been changed since."""
    folder = RunFolder(path)
    if mended := _failed_with(folder):
        with suppress(FolderInUseError):  # another command has begun it anew
            _keep_earlier(folder, f"; it failed with {mended[0]}")


def _keep_earlier(folder: RunFolder, why: str = "") -> None:
    if kept := folder.move_aside():
        print(f"the earlier run is kept in {kept}{why}")


def _failed_with(folder: RunFolder) -> list[str]:
    """As `other_code`, for a run that failed; else nothing."""
    return other_code(folder) if folder.state == "failed" else []


def show(experiment: Experiment) -> None:
    """Show a finished run as it was shown when it ended, with warnings of what has changed since."""
    folder, now = RunFolder(experiment.folder), environment(experiment.device)
    results: dict[str, Any] = folder.results
    console = make_console()
    console.print("This run is done (rerun=true runs it again).")
    show_results(results, folder.path, console)
    if experiment.config["trainer"]["keep_checkpoint"] and not (folder.path / CHECKPOINTS).exists():
        console.print("warning: its checkpoint was not kept")
    for what in (*other_images(experiment), *other_code(folder)):
        console.print(f"warning: it was made with {what}")
    last = differences([results["environment"]], now)
    for what in last:
        console.print(f"warning: it was made with {what}")
    for what in differences(results.get("earlier_environments", []), now):
        if what not in last:
            console.print(f"warning: part of it was made with {what}")
