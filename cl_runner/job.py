"""One job of the command line: its experiment, carried out in its folder."""

import gc
import os
import shlex
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from cl_runner.checkpoint import FOLDER as CHECKPOINTS
from cl_runner.clock import environment
from cl_runner.config import Experiment
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder, groups
from cl_runner.identity import sources
from cl_runner.interrupt import Interrupt, Stopped
from cl_runner.run import run
from cl_runner.trackers.console import Console, log_file, log_to, show_results, the_console


def carry_out(experiment: Experiment) -> float | None:
    """Run an experiment in its folder, and leave word of how it ended.

    Returns its accuracy on the validation splits, or on the test splits where there are none. Raises what the run
    raises; FolderInUseError where another process is at it; Stopped where a signal ended it and no launcher took over.
    """
    folder, interrupt = RunFolder(experiment.folder), Interrupt(experiment.config["rerun"])
    if shown_if_done(experiment):
        return _outcome(folder.results)
    gc.collect()  # an earlier job's model, which lies in cycles: Python knows nothing of a GPU's memory
    try:
        with folder.locked(), interrupt.listening():
            outcome = _outcome(_carried_out(experiment, folder, interrupt))
    except Stopped as stopped:
        interrupt.hand_on(stopped)
        raise
    if interrupt.asked is not None:
        # There was nothing left to stop here: it is for what comes next, a sweep's job.
        signal.raise_signal(signal.Signals[interrupt.asked])
    return outcome


def _carried_out(experiment: Experiment, folder: RunFolder, interrupt: Interrupt) -> dict[str, Any]:
    if folder.done:  # by another process, since it was asked
        return folder.results
    new = not folder.status
    if (folder.path / CHECKPOINTS).exists():
        interrupt.place = "goes on where it was saved"  # until it has been read, and the place is known
    folder.write_config(experiment.config)
    folder.start(
        hash=experiment.hash,
        group=experiment.group,
        pid=os.getpid(),
        host=socket.gethostname(),
        command=shlex.join(["cl-runner", *sys.argv[1:]]),
        images=experiment.stream.contents(experiment.config["data_root"]),
        code=sources(experiment.config["plugins"]),
        environment=environment(experiment.device),
    )
    console = the_console()
    with log_to(console), log_file(folder.path):
        try:
            return run(experiment, folder, [experiment.tracker, Console(console, experiment.tracker.line)], interrupt)
        except BaseException as error:
            if interrupt.stopping is not None:
                folder.stop(interrupt.stopping)
            elif new and isinstance(error, ConfigError):
                shutil.rmtree(folder.path)  # nothing was begun in it
            else:
                folder.fail(error, traceback.format_exc())
            raise


def _outcome(results: dict[str, Any]) -> float | None:
    measured = results["metrics"]
    validation = measured.get("validation_accuracy")
    return measured["average_accuracy"] if validation is None else validation


def shown_if_done(experiment: Experiment) -> bool:
    """Whether the run is done; then it is shown.

    Raises ConfigError as `refuse_other_images` does, done or not, and as `refuse_other_code` does.
    """
    refuse_other_images(experiment)
    refuse_other_code(experiment)
    done = RunFolder(experiment.folder).done
    if done:
        join(experiment)
        show(experiment)
    return done


def join(experiment: Experiment) -> None:
    """Note of a finished run that it is also one of this experiment's group: with `stream.seed=0` the run of seed 0 is
    that of `seed=0` alone, and others go with it."""
    folder = RunFolder(experiment.folder)
    if folder.done and experiment.group not in groups(folder.status):
        with folder.locked():
            folder.update_status(groups=[*groups(folder.status), experiment.group])


def refuse_other_images(experiment: Experiment) -> None:
    """Folders of images are no part of a run's hash, and may be others under the same name.

    Raises ConfigError where the run was begun with others than are there now.
    """
    then = RunFolder(experiment.folder).status.get("images")
    now = experiment.stream.contents(experiment.config["data_root"]) if then else None
    if now and then != now:
        images = Path(experiment.config["data_root"]) / experiment.config["stream"]["name"]
        raise ConfigError(
            str(experiment.folder), f"was begun with other images than are in {images} now; rerun=true runs it again"
        )


def changed_plugins(experiment: Experiment) -> list[str]:
    """Those whose code is another now than it was when the run began."""
    then = RunFolder(experiment.folder).status.get("code") or {}
    return [name for name, code in sources(experiment.config["plugins"]).items() if then.get(name, code) != code]


def refuse_other_code(experiment: Experiment) -> None:
    """A run that goes on would be half the work of the one, half of the other.

    Raises ConfigError where it was saved with other code of a plugin than is there now.
    """
    folder = RunFolder(experiment.folder)
    if not folder.done and (folder.path / CHECKPOINTS).exists() and (names := changed_plugins(experiment)):
        raise ConfigError(
            str(experiment.folder),
            f"was saved with other code of {', '.join(names)} than is there now; rerun=true runs it again",
        )


def move_aside(experiment: Experiment) -> None:
    """Make room for a run that is to be made again."""
    folder = RunFolder(experiment.folder)
    if experiment.config["rerun"] and folder.path.exists():
        print(f"the earlier run is kept in {folder.move_aside()}")


def show(experiment: Experiment) -> None:
    """Show a finished run as it was shown when it ended."""
    folder, now = RunFolder(experiment.folder), environment(experiment.device)
    results: dict[str, Any] = folder.results
    then = results["environment"]
    console = the_console()
    console.print("This run is done (rerun=true runs it again).")
    show_results(results, folder.path, console)
    for name in changed_plugins(experiment):
        console.print(f"warning: it was made with other code of {name} than is there now")
    for package in ("cl_runner", "torch"):
        if then.get(package) != now[package]:
            console.print(f"warning: it was made with {package} {then.get(package)}; {now[package]} is installed now")
