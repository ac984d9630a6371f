"""The command line: compose, check, run."""

import os
import sys
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cl_runner.compose import CONF, VERSION_BASE, choices, compose_jobs, in_order
from cl_runner.config import check
from cl_runner.errors import ConfigError

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
    from cl_runner.job import is_done, move_aside, show
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
    from cl_runner.job import carry_out

    try:
        return carry_out(check(cfg))
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
