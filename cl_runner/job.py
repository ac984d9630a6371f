"""One job of the command line: its experiment, carried out in its folder."""

import os
import shutil
import sys
import time
import traceback
from typing import Any

from cl_runner.clock import environment
from cl_runner.config import Experiment
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.run import run
from cl_runner.trackers.console import Console, log_file, log_to, show_results, the_console


def carry_out(experiment: Experiment) -> float | None:
    """Run an experiment in its folder, and leave word of how it ended. Returns its average accuracy."""
    folder = RunFolder(experiment.folder)
    if folder.done:
        show(experiment)
        return folder.results["metrics"]["average_accuracy"]
    new = not folder.status
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config(experiment.config)
    folder.start(
        pid=os.getpid(),
        started=time.time(),
        command=" ".join(sys.argv),
        environment=environment(experiment.device),
    )
    console = the_console()
    with log_to(console), log_file(folder.path):
        try:
            results = run(experiment, folder, [experiment.tracker, Console(console, experiment.tracker.line)])
        except BaseException as error:
            if new and isinstance(error, ConfigError):
                shutil.rmtree(folder.path)  # nothing was begun in it
                raise
            folder.fail(error, traceback.format_exc())
            raise
    return results["metrics"]["average_accuracy"]


def is_done(experiment: Experiment) -> bool:
    return RunFolder(experiment.folder).done


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
    for package in ("cl_runner", "torch"):
        if then.get(package) != now[package]:
            console.print(f"warning: it was made with {package} {then.get(package)}; {now[package]} is installed now")
