"""What becomes of a run that is asked for again: shown, moved aside, or refused where it cannot go on."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_runner.checkpoint import FOLDER as CHECKPOINTS
from cl_runner.config import Experiment
from cl_runner.environment import environment
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.identity import plugin_digests
from cl_runner.lock import FolderInUseError
from cl_runner.trackers.console import show_results, the_console


def shown_if_done(experiment: Experiment) -> bool:
    """Whether the run is done; then it is shown.

    Raises ConfigError as `refuse_halves` does.
    """
    refuse_halves(experiment)
    done = RunFolder(experiment.folder).done
    if done:
        join(experiment)
        show(experiment)
    return done


def join(experiment: Experiment) -> None:
    """Note of a finished run that it is also one of this experiment's group: with `stream.seed=0` the run of seed 0 is
    that of `seed=0` alone, and others go with it."""
    folder = RunFolder(experiment.folder)
    groups = folder.status.get("groups") or []
    if folder.done and experiment.group not in groups:
        with folder.locked():
            folder.update_status(groups=[*groups, experiment.group])


def refuse_halves(experiment: Experiment) -> None:
    """A run that goes on with other images or other code would be half the work of the one, half of the other.

    Raises ConfigError where a run that is not done was begun on other images than are there now, or saved with other
    code of a plugin.
    """
    folder = RunFolder(experiment.folder)
    if folder.done:
        return
    halves = [f"begun with {images}" for images in other_images(experiment)]
    if (folder.path / CHECKPOINTS).exists():
        halves += [f"saved with {code}" for code in other_code(experiment)]
    if halves:
        raise ConfigError(str(experiment.folder), f"was {', and '.join(halves)}; rerun=true runs it again")


def other_images(experiment: Experiment) -> list[str]:
    """What to say where the folder of images, which is no part of a run's hash, holds others than when it began."""
    then = RunFolder(experiment.folder).status.get("images")
    now = experiment.stream.contents(experiment.config["data_root"]) if then else None
    place = Path(experiment.config["data_root"]) / experiment.config["stream"]["name"]
    return [f"other images than are in {place} now"] if now and then != now else []


def other_code(experiment: Experiment) -> list[str]:
    """What to say where a plugin's code is another now than it was when the run began."""
    return _other_code(RunFolder(experiment.folder), experiment.config["plugins"])


def is_made_again(experiment: Experiment) -> bool:
    """Whether rerun=true says so, or a plugin whose fault may have ended the run has been changed since."""
    return experiment.config["rerun"] or bool(_failed_with(RunFolder(experiment.folder), experiment.config["plugins"]))


def move_aside(experiment: Experiment) -> None:
    """Make room for a run that is to be made again.

    Raises FolderInUseError where rerun=true says so and another process is at it.
    """
    if experiment.config["rerun"]:
        _keep_earlier(RunFolder(experiment.folder))
    else:
        move_aside_if_mended(experiment.folder, experiment.config["plugins"])


def move_aside_if_mended(path: Path, plugins: Sequence[str]) -> None:
    """Make room for a run that failed, where a plugin whose fault it may have been has been changed since."""
    folder = RunFolder(path)
    if mended := _failed_with(folder, plugins):
        with suppress(FolderInUseError):  # another command has begun it anew
            _keep_earlier(folder, f"; it failed with {mended[0]}")


def _keep_earlier(folder: RunFolder, why: str = "") -> None:
    if kept := folder.move_aside():
        print(f"the earlier run is kept in {kept}{why}")


def _failed_with(folder: RunFolder, plugins: Sequence[str]) -> list[str]:
    """Other code of a plugin than is there now, where the run failed with it."""
    return _other_code(folder, plugins) if folder.state == "failed" else []


def _other_code(folder: RunFolder, plugins: Sequence[str]) -> list[str]:
    then = folder.status.get("code") or {}
    changed = [name for name, code in plugin_digests(plugins).items() if then.get(name, code) != code]
    return [f"other code of {', '.join(changed)} than is there now"] if changed else []


def show(experiment: Experiment) -> None:
    """Show a finished run as it was shown when it ended."""
    folder, now = RunFolder(experiment.folder), environment(experiment.device)
    results: dict[str, Any] = folder.results
    then = results["environment"]
    console = the_console()
    console.print("This run is done (rerun=true runs it again).")
    show_results(results, folder.path, console)
    for what in (*other_images(experiment), *other_code(experiment)):
        console.print(f"warning: it was made with {what}")
    for package in ("cl_runner", "torch"):
        if then.get(package) != now[package]:
            console.print(f"warning: it was made with {package} {then.get(package)}; {now[package]} is installed now")
