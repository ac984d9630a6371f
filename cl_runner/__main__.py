"""The command line: compose, check, run."""

import os
import shutil
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cl_runner.compose import CONF, VERSION_BASE, choices, compose_jobs, in_order
from cl_runner.config import check
from cl_runner.errors import ConfigError

if TYPE_CHECKING:
    from cl_runner.config import Experiment

# These only print something about the configuration: Hydra answers them, and torch is never imported.
ASKS_HYDRA = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}


def main() -> None:
    """What the `cl-runner` script runs. Exit status: 0 done, 1 a run failed, 2 the configuration cannot work."""
    argv = sys.argv[1:]
    if argv[:1] == ["list"]:
        list_choices(argv[1:])
    elif any(word.partition("=")[0] in ASKS_HYDRA for word in argv):
        if any(word.partition("=")[0] in ("--cfg", "-c") for word in argv):
            try_composing(argv)
        hydra_main()
    else:
        run_jobs(argv)


def try_composing(argv: list[str]) -> None:
    """Say in a line why there is no such configuration to show."""
    try:
        if len(compose_jobs(in_order(argv))) > 1:
            raise ConfigError("command line", "--cfg shows one configuration, not those of a sweep")
    except ConfigError as error:
        _refuse(error)


def run_jobs(argv: list[str]) -> None:
    """Check every job that the command line asks for, then let Hydra carry them out."""
    from cl_runner.trackers.console import log_to, the_console

    try:
        with log_to(the_console()):  # data may have to be downloaded and decoded
            sys.argv[1:] = in_order(argv)
            jobs = [check(cfg) for cfg in compose_jobs(sys.argv[1:])]
    except ConfigError as error:
        _refuse(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here; they are said once, in one line
    for job in jobs:
        move_aside(job)
    if all(is_done(job) for job in jobs):  # Hydra would write into their folders
        for job in jobs:
            show(job)
        return
    try:
        hydra_main()
    except KeyboardInterrupt:
        print("cl-runner: stopped; the same command goes on after the last finished task", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # of a job of a multirun: the others were carried out
        _say(error)
        sys.exit(1)


@hydra.main(config_path=str(CONF), config_name="config", version_base=VERSION_BASE)
def hydra_main(cfg: DictConfig) -> float | None:
    """One job. Returns the run's average accuracy."""
    from cl_runner.__main__ import carry_out  # under `python -m` this module is called __main__; workers know its name

    try:
        return carry_out(cfg)
    except ConfigError as error:  # what only building could tell: weights that cannot be fetched, say
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _refuse(error)
    except Exception as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the sweep goes on, and knows
        _say(error)
        sys.exit(1)


def _refuse(error: ConfigError) -> NoReturn:
    print(f"cl-runner: {error}", file=sys.stderr)
    sys.exit(2)


def _say(error: Exception) -> None:
    print(f"cl-runner: {type(error).__name__}: {error}", file=sys.stderr)


def carry_out(cfg: DictConfig) -> float | None:
    """Run one experiment in its folder, and leave word of how it ended."""
    from cl_runner.clock import environment
    from cl_runner.folder import RunFolder
    from cl_runner.run import run
    from cl_runner.trackers.console import Console, log_file, log_to, the_console

    experiment = check(cfg)
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


def is_done(experiment: "Experiment") -> bool:
    from cl_runner.folder import RunFolder

    return RunFolder(experiment.folder).done


def move_aside(experiment: "Experiment") -> None:
    """Make room for a run that is to be made again."""
    from cl_runner.folder import RunFolder

    folder = RunFolder(experiment.folder)
    if experiment.config["rerun"] and folder.path.exists():
        print(f"the earlier run is kept in {folder.move_aside()}")


def show(experiment: "Experiment") -> None:
    """Show a finished run as it was shown when it ended."""
    from cl_runner.clock import environment
    from cl_runner.folder import RunFolder
    from cl_runner.trackers.console import show_results, the_console

    folder, now = RunFolder(experiment.folder), environment(experiment.device)
    results: dict[str, Any] = folder.results
    then = results["environment"]
    console = the_console()
    console.print("This run is done (rerun=true runs it again).")
    show_results(results, folder.path, console)
    for package in ("cl_runner", "torch"):
        if then.get(package) != now[package]:
            console.print(f"warning: it was made with {package} {then.get(package)}; {now[package]} is installed now")


def list_choices(groups: list[str]) -> None:
    """Print every choice of every group, or of those named, a line each."""
    found = choices()
    unknown = [group for group in groups if group not in found]
    if unknown:
        print(f"cl-runner list: expected groups among {', '.join(found)}, got {unknown[0]!r}", file=sys.stderr)
        sys.exit(2)
    for group in groups or found:
        print(f"{group}=")
        for choice, says in found[group].items():
            print(f"  {choice:<24}{says}")


if __name__ == "__main__":
    from cl_runner.__main__ import main as main_of_the_package

    main_of_the_package()
