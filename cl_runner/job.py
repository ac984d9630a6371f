"""One job: run an experiment in its folder, and record how it ended."""

import gc
import os
import shutil
import signal
import socket
from typing import Any

from cl_runner.checkpoint import FOLDER as CHECKPOINTS
from cl_runner.config import Experiment
from cl_runner.environment import environment
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.interrupt import Interrupt, Stopped, heed_all, sweep_listens
from cl_runner.logs import log_file, log_to
from cl_runner.rerun import shown_if_done
from cl_runner.run import run
from cl_runner.sources import code_of
from cl_runner.sweep import place_of
from cl_runner.trackers.console import TerminalTracker, make_console


def carry_out(experiment: Experiment, command: str = "") -> float | None:
    """Run an experiment in its folder, and record how it ended. `command`: what asks for it; empty for a script's own.

    Returns its accuracy on the validation splits, or on the test splits if there are none. Raises what the run raises;
    FolderInUseError if another process is running it; Stopped if a signal ended it and no launcher took over.
    """
    folder, interrupt = RunFolder(experiment.folder), Interrupt(experiment.config["rerun"])
    if shown_if_done(experiment):
        return _outcome(folder.results)
    failed = True
    try:
        with folder.locked(), interrupt.listening():
            outcome = _outcome(_carried_out(experiment, folder, interrupt, command))
        failed = False
    except Stopped as stopped:
        interrupt.hand_on(stopped)
        raise
    finally:
        if interrupt.asked is not None and interrupt.stopping is None and (not failed or sweep_listens()):
            # There was nothing left to stop here: the signal is for whatever comes next, such as a sweep's next job.
            # Without a sweep, it would hide the error that the run ended with.
            signal.raise_signal(signal.Signals[interrupt.asked])
    return outcome


def _carried_out(experiment: Experiment, folder: RunFolder, interrupt: Interrupt, command: str) -> dict[str, Any]:
    if folder.done:  # by another process, since the check above
        return folder.results
    new = not folder.status
    if (folder.path / CHECKPOINTS).exists():
        interrupt.place = "goes on where it was saved"  # until the checkpoint has been read, and the place is known
    with interrupt.deferred():  # what a collection calls cannot raise Stopped
        gc.collect()  # frees an earlier job's model, which is in cycles: a full GPU does not trigger it
    heed_all()
    folder.write_config(experiment.config)
    console = make_console()
    with log_to(console), log_file(folder.path):
        try:
            shown = TerminalTracker(console, experiment.tracker.line, place_of(experiment.folder))
            folder.start(
                hash=experiment.hash,
                groups=[experiment.group],
                pid=os.getpid(),
                host=socket.gethostname(),
                command=command,
                images=experiment.stream.contents(experiment.config["data_root"]),
                code=code_of(experiment.config),
                environment=environment(experiment.device),
            )
            return run(experiment, folder, [experiment.tracker, shown], interrupt)
        except ConfigError:
            if new:
                shutil.rmtree(folder.path)  # the run never began
            raise


def _outcome(results: dict[str, Any]) -> float | None:
    measured = results["metrics"]
    validation = measured.get("validation_accuracy")
    return measured["average_accuracy"] if validation is None else validation
