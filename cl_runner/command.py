"""Carry out a command line of overrides: one run, or the jobs of a sweep."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cl_runner import CONF
from cl_runner.command_line import in_order, without_dry_run
from cl_runner.components import check_plugin
from cl_runner.compose import GRID, VERSION_BASE, Request, compose_jobs, knows_all_keys, parse
from cl_runner.config import Experiment, check, validated, with_valid_settings
from cl_runner.errors import ConfigError, in_a_line, raised_at
from cl_runner.identity import display_name
from cl_runner.interrupt import ending_at_once

if TYPE_CHECKING:
    from cl_runner.strategies.base import Strategy

PLUGINS = "hydra_plugins.cl_runner"  # the launchers and sweepers of this project
OPTUNA = f"{PLUGINS}.sweepers.Optuna"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs jobs in this process


def run(argv: list[str]) -> None:
    """Check everything that the command line asks for, then carry it out, or with --dry-run say what that would be.

    Raises ConfigError, as do the functions below.
    """
    from cl_runner.logs import log_to
    from cl_runner.trackers.console import make_console

    with log_to(make_console()):  # data may have to be downloaded and decoded
        wanted = without_dry_run(argv)
        sys.argv[1:] = in_order(wanted)
        with ending_at_once():
            request = parse(sys.argv[1:])
            import_module("cl_runner.job")  # and PyTorch: most of what takes seconds
        tried: list[Any] = []
        jobs = [_checked(number, request, tried) for number in range(len(request.jobs))]
        if request.sweep:
            _check_sweep(request, jobs)
        _say_unused(request, jobs)
        _say_random(jobs)
    if request.hydra.sweeper.get("params") and not request.sweep:
        print("this experiment holds a grid: -m runs every job, and without it only one configuration is run")
    if len(wanted) < len(argv):
        _foretell(request, jobs)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back here, to be printed once, in one line
    if request.sweep:
        try:
            sys.exit(run_sweep(request, jobs))
        except OSError as error:  # the plan could not be written: a full disk
            sys.exit(_say_failed(error))
    sys.argv[1:] = request.argv
    run_alone(jobs[0])


def _foretell(request: Request, experiments: list[Experiment]) -> None:
    from cl_runner.plan import foretold, planned

    for line in foretold(planned(request, experiments), experiments):
        print(line)


def _checked(number: int, request: Request, tried: list[Any]) -> Experiment:
    """Raises ConfigError, which names the job where there are several."""
    from cl_runner.sweep import not_shared

    try:
        return check(request.jobs[number][1], tried)
    except ConfigError as error:
        if len(request.jobs) == 1:
            raise
        own = " ".join(not_shared([words for words, _ in request.jobs])[number])
        raise ConfigError(error.field, f"{error.message} (in the job {own})") from None


def try_composing(argv: list[str]) -> None:
    """Raise ConfigError if `--cfg` has no valid configuration to show."""
    words = in_order(argv)
    first, *others = compose_jobs(words)
    if others or "--multirun" in words:
        raise ConfigError("command line", "--cfg shows one configuration, not those of a sweep")
    if OmegaConf.missing_keys(first):  # the user is to see them
        return
    with_valid_settings(first)
    if not knows_all_keys(words):  # only the components know which, and they take seconds to import
        validated(first)


def run_alone(experiment: Experiment) -> None:
    """Carry out one experiment, or show its results if it is done."""
    from cl_runner.rerun import shown_if_done

    make_room(experiment)
    if shown_if_done(experiment):  # Hydra would write into its folder
        return
    try:
        _hydra_run()
    except ConfigError:  # what only building reveals: weights that cannot be fetched, say
        raise
    except Exception as error:
        log = experiment.folder / "run.log"
        # A disk's fault is not the code's; of any other, the line says more than the type.
        where = "" if isinstance(error, OSError) else raised_at(error)
        whole = f"; {log} has the whole of it" if log.exists() else ""
        sys.exit(_say_failed(error, (f" ({where})" if where else "") + whole))


def make_room(experiment: Experiment) -> None:
    """Move aside what is to be run again.

    Raises FolderInUseError if another process is running it: Hydra would write into its folder.
    """
    from cl_runner.rerun import move_aside, refuse_if_running

    refuse_if_running(experiment)
    move_aside(experiment)


def run_sweep(request: Request, experiments: list[Experiment]) -> int:
    """Carry out the jobs that are not done, and summarise them all. Returns the exit status."""
    from cl_runner.interrupt import Interrupt, same_command
    from cl_runner.plan import begin, planned, remarks
    from cl_runner.rerun import join
    from cl_runner.sweep import of_this_command

    sys.argv[1:] = request.argv
    sweep = planned(request, experiments)
    for line in remarks(sweep, experiments):
        print(line)
    begin(sweep, experiments)
    done_before = sweep.counts()["done"]
    stopped: KeyboardInterrupt | None = None
    interrupt = Interrupt()
    # A signal between two jobs waits until the next one is to begin. Jobs in other processes have launchers that stop
    # them.
    here = request.hydra.launcher._target_ == BASIC
    with interrupt.listening() if here else nullcontext(), interrupt.deferred(), _passed_over_by_collections():
        try:
            if not sweep.jobs or done_before < len(sweep.jobs):
                hydra_main()
        except KeyboardInterrupt as error:
            stopped = error
        except Exception as error:  # from the launcher itself: a job's own error is in the plan
            _say_failed(error)
        for experiment in experiments:
            join(experiment)
        sweep = of_this_command(sweep.root)
        sweep.close()
        for line in sweep.summary(done_before):
            print(line)
    if stopped is not None:
        again = same_command(rerun=experiments[0].config["rerun"])
        print(f"cl-runner: stopped; {again} goes on", file=sys.stderr)
        return getattr(stopped, "status", 130)
    return 0 if sweep.jobs and sweep.counts()["done"] == len(sweep.jobs) else 1


@contextmanager
def _passed_over_by_collections() -> Iterator[None]:
    """Have the garbage collector pass over all that exists, modules above all: it is called before every job."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_submitted(argv: list[str], folder: Path) -> None:
    """Carry out one job of a sweep in a process of its own; it was checked when it was submitted.

    Raises what the run raises, and ConfigError if the job has changed since.
    """
    from cl_runner.folder import RunFolder
    from cl_runner.logs import log_to
    from cl_runner.trackers.console import make_console

    with log_to(make_console()):
        sys.argv[1:] = in_order(argv)
        request = parse(sys.argv[1:])
        ((_, cfg),) = request.jobs
        now = check(cfg).folder.name
    if now != folder.name:
        raise ConfigError("conf", f"changed since submission: {folder.name} would be {now}; give the command again")
    if RunFolder(folder).state not in ("done", "running"):
        os.environ["HYDRA_FULL_ERROR"] = "1"
        sys.argv[1:] = request.argv
        hydra_main()


def _job(cfg: DictConfig) -> None:
    """Run one job, as Hydra calls it."""
    from cl_runner.job import carry_out
    from cl_runner.sweep import this_command

    carry_out(check(cfg), this_command())


_main = hydra.main(config_path=str(CONF), config_name="config", version_base=VERSION_BASE)
hydra_main = _main(_job)


def _hydra_run() -> None:
    """Have Hydra run the one job. Raises what the run raises, without the line that Hydra would print first."""
    failed: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        try:
            _job(cfg)
        except Exception as error:
            failed.append(error)

    _main(job)()
    for error in failed:
        raise error


def _check_sweep(request: Request, jobs: list[Experiment]) -> None:
    """Check what only a sweep has: its sweeper, its launcher, and the validation data that a search selects by."""
    sweeper = request.hydra.sweeper._target_
    if sweeper not in (GRID, OPTUNA):
        raise ConfigError("hydra/sweeper", f"expected grid or optuna, got {sweeper}")
    for name in ("sweeper", "launcher"):
        node: Any = OmegaConf.to_container(request.hydra[name], resolve=True)
        if node["_target_"].startswith(PLUGINS):
            check_plugin(f"hydra.{name}", node, PLUGINS)
    if sweeper != OPTUNA:
        return
    if not all(job.config["stream"].get("validation") for job in jobs):
        raise ConfigError(
            "stream.validation", "expected a share above 0: hydra/sweeper=optuna selects by it, and never by test data"
        )
    if not request.swept:
        some = "strategy=ewc,lwf or 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        raise ConfigError(
            "hydra/sweeper", f"optuna expected something to search, such as {some}, got only single values"
        )


def _say_unused(request: Request, jobs: list[Experiment]) -> None:
    """Warn of what was given on the command line but changes nothing: a memory or a Fisher that no strategy takes,
    epochs beside iterations, adapting statistics of a backbone that the strategy keeps as it is."""

    def given(*beginnings: str) -> bool:
        return any(word.lstrip("+").startswith(beginnings) for word in request.argv)

    if given("trainer.epochs=") and all(job.config["trainer"]["iterations"] for job in jobs):
        print("cl-runner: trainer.epochs: trainer.iterations is given; it changes nothing", file=sys.stderr)
    if given("trainer.eval_every=") and all(job.strategy.closed_form for job in jobs):
        print("cl-runner: trainer.eval_every: this strategy takes no steps; it changes nothing", file=sys.stderr)
    if given("model.norm_stats=adapt") and all(_keeps_statistics(job.strategy) for job in jobs):
        print("cl-runner: model.norm_stats: this strategy keeps the backbone's; it changes nothing", file=sys.stderr)
    for name in ("memory", "fisher"):
        if given(f"{name}=", f"{name}.") and not any(_takes(job.config["strategy"], name) for job in jobs):
            whose = "no strategy of this sweep takes one" if request.sweep else "this strategy takes none"
            print(f"cl-runner: {name}: {whose}; it changes nothing", file=sys.stderr)


def _keeps_statistics(strategy: "Strategy") -> bool:
    return strategy.caches_features or strategy.extends_backbone or strategy.closed_form


def _say_random(jobs: list[Experiment]) -> None:
    """Warn of random weights where a method, or `model.freeze`, builds on a pretrained backbone."""
    fresh = [job for job in jobs if not job.config["model"].get("pretrained")]
    names = [display_name("strategy", job.config["strategy"]) for job in fresh if job.strategy.for_pretrained]
    names += ["model.freeze" for job in fresh if "*" in (job.config["model"].get("freeze") or ())]
    if names:
        what = f"random weights, where a pretrained backbone is meant for {', '.join(dict.fromkeys(names))}"
        print(f"cl-runner: model.pretrained: false gives {what}", file=sys.stderr)


def _takes(strategy: dict[str, Any], name: str) -> bool:
    """Whether the strategy, or one of its parts, has a component of that name."""
    parts = {key: value for key, value in strategy.items() if isinstance(value, dict)}
    return name in parts or any(_takes(part, name) for part in parts.values())


def _say_failed(error: Exception, where: str = "") -> int:
    """Print an error in one line. Returns the exit status."""
    print(f"cl-runner: {in_a_line(error)}{where}", file=sys.stderr)
    return 1
