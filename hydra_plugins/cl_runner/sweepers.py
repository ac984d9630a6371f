"""Hydra's sweepers: a grid, whose jobs are all known in advance, and a search, which asks for them one by one.

Hydra imports this file whenever it starts, so nothing heavy is imported before it is needed.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from pydantic import NonNegativeInt

from cl_runner.errors import ConfigError, in_a_line, missing_extra
from cl_runner.ranges import Count

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

    from cl_runner.sweep import Job, Sweep


class ComposedOnce:
    """Hydra's loader of configurations, for the launcher: it is handed the one that was composed to check its job."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def composed(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        now = self._composed[tuple(overrides)] = self._composed_now(config, overrides)
        return now

    def load_sweep_config(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        return self._composed.pop(tuple(overrides), None) or self._composed_now(config, overrides)

    def _composed_now(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        from cl_runner.compose import lenient

        try:
            return self._loader.load_sweep_config(config, overrides)
        except HydraException:  # an argument that its component takes but its YAML does not list
            groups = self._loader.list_groups("")
            return self._loader.load_sweep_config(config, [lenient(word, groups) for word in overrides])

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)


class Planned(Sweeper):
    """What the sweepers share: they pass jobs in the sweep's plan to the launcher."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from cl_runner.sweep import of_this_command

        self.config: DictConfig = config
        self.loader = hydra_context.config_loader
        self.plan: Sweep = of_this_command(Path(config.output_root))
        self.once = ComposedOnce(self.loader)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(cast(ConfigLoader, self.once), hydra_context.callbacks),
            task_function=task_function,
            config=config,
        )

    def launch(self, jobs: "Sequence[Job]") -> None:
        """Carry out the jobs that are not done; what goes wrong outside of their runs is recorded in the plan.

        Raises Stopped if the sweep was told to stop between two jobs.
        """
        from cl_runner.interrupt import heed_all

        # Within this process they are launched one by one, so that each is checked when its turn comes. Jobs in
        # processes of their own check themselves.
        alone = type(self.launcher).__name__ == "BasicLauncher"
        over = ("done",) if getattr(self.launcher, "finds_running", False) else ("done", "running")
        for batch in [[job] for job in jobs] if alone else [list(jobs)]:
            heed_all()
            left = [job for job in batch if self.plan.outcome(job)[0] not in over]
            todo = [job for job in left if not alone or self._unchanged(job)]
            if todo:
                overrides, first = [job.overrides for job in todo], self.plan.jobs.index(todo[0])
                for job, ended in zip(todo, self.launcher.launch(overrides, first), strict=True):
                    if ended.status is JobStatus.FAILED:
                        self._failed(job, ended._return_value)
                        ended._return_value = None  # its traceback keeps the whole run in memory

    def _unchanged(self, job: "Job") -> bool:
        """Whether the job's overrides still compose to what they did when the sweep was planned."""
        try:
            now = self.once.composed(self.config, job.overrides).hydra.sweep.subdir
        except Exception as error:  # whatever the files contain by now
            why = str(error).partition("\n")[0]
            self._failed(job, ConfigError("conf", f"changed since submission, and cannot be read now: {why}"))
            return False
        if now != job.folder:
            self._failed(job, ConfigError("conf", f"changed since submission: {job.folder} would be {now}"))
        return now == job.folder

    def _failed(self, job: "Job", error: Any) -> None:
        job.error = str(error) if type(error) is RuntimeError else in_a_line(error)
        self.plan.write()


class Grid(Planned):
    """The product of all values, checked and planned before Hydra started."""

    def sweep(self, arguments: list[str]) -> None:
        self.launch(self.plan.jobs)


class Optuna(Planned):
    """A search for the highest validation accuracy, by Optuna's samplers. It resumes where it was stopped.

    trials: in total, including earlier ones. at_once: how many are asked for and launched together.
    """

    def __init__(
        self,
        trials: Count = 20,
        at_once: Count = 1,
        sampler: Literal["tpe", "random", "cmaes", "qmc"] = "tpe",
        seed: NonNegativeInt = 0,
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__(params)
        if find_spec("optuna") is None:
            raise missing_extra("hydra/sweeper", "optuna")
        self.trials, self.at_once, self.sampler, self.seed = trials, at_once, sampler, seed

    def sweep(self, arguments: list[str]) -> None:
        from cl_runner.rerun import move_aside_if_mended

        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(words)
        by_key = {override.get_key_element().lstrip("+"): override for override in overrides}
        space = {key: _distribution(override) for key, override in by_key.items() if override.is_sweep_override()}
        fixed = [str(override.input_line) for override in by_key.values() if not override.is_sweep_override()]
        study = self._study([str(override.input_line) for override in by_key.values()])
        known = [trial for trial in study.trials if trial.params.keys() == space.keys()]

        def job(trial: Any) -> "Job":
            return self._planned([*fixed, *(f"{key}={trial.params[key]}" for key in space)])

        jobs = {trial.number: job(trial) for trial in known}
        batch: list[Any] = [trial for trial in known if not trial.state.is_finished()]
        while batch or len(study.trials) < self.trials:
            batch = batch or [study.ask(space) for _ in range(min(self.at_once, self.trials - len(study.trials)))]
            jobs |= {trial.number: job(trial) for trial in batch}
            for trial in batch:  # a grid's jobs are known, and moved, before the sweep begins
                move_aside_if_mended(self.plan.root / jobs[trial.number].folder)
            self.launch([jobs[trial.number] for trial in batch])
            for trial in batch:
                self._tell(study, trial.number, jobs[trial.number])
            batch = []
        _say_best(study)

    def _planned(self, overrides: list[str]) -> "Job":
        """Add a trial's job to the plan, unless it is there, and return it."""
        from cl_runner.config import validated
        from cl_runner.identity import digest, run_folder
        from cl_runner.sweep import Job

        config = validated(self.once.load_sweep_config(self.config, overrides))
        job = Job(overrides, run_folder(config).name, digest(config))
        found = next((other for other in self.plan.jobs if other.folder == job.folder), None)
        if found is None:
            self.plan.jobs.append(job)
            self.plan.write()
        return found or job

    def _tell(self, study: "Study", number: int, job: "Job") -> None:
        """Report a trial's outcome to the study, except if it was stopped or killed: it resumes the next time."""
        from optuna.trial import TrialState

        from cl_runner.folder import RunFolder

        state, _ = self.plan.outcome(job)
        if state == "done":
            results = RunFolder(self.plan.root / job.folder).results
            study.tell(number, results["metrics"]["validation_accuracy"])
        elif state == "failed":
            study.tell(number, state=TrialState.FAIL)

    def _study(self, words: list[str]) -> "Study":
        """The study for exactly these words: another search in the same folder has a study of its own."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name = hashlib.sha256(json.dumps(sorted(words)).encode()).hexdigest()[:8]
        storage = JournalStorage(JournalFileBackend(str(self.plan.root / "optuna.journal")))
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        # Seeded anew each time: a search that resumes would otherwise ask for its first trials again.
        study.sampler = self._sampler(self.seed + len(study.trials))
        return study

    def _sampler(self, seed: int) -> Any:
        from optuna import samplers

        if self.sampler == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=self.at_once > 1)
        classes = {"random": "RandomSampler", "cmaes": "CmaEsSampler", "qmc": "QMCSampler"}
        return getattr(samplers, classes[self.sampler])(seed=seed)


def _distribution(override: Override) -> "BaseDistribution":
    """The distribution of an override's values; `tag(log, interval(a, b))` is logarithmic."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low or 0), float(high or 0), log=log)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _say_best(study: "Study") -> None:
    from optuna.trial import TrialState

    if done := study.get_trials(states=[TrialState.COMPLETE]):
        failed = len(study.get_trials(states=[TrialState.FAIL]))
        trials = f"{len(done)} completed trial{'s' * (len(done) != 1)}{f' ({failed} failed)' * bool(failed)}"
        words = " ".join(f"{key}={value}" for key, value in study.best_params.items())
        print(f"best of {trials}: validation accuracy {100 * study.best_value:.2f} % with {words}")
