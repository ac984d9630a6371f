"""Weights & Biases (https://docs.wandb.ai): a view of the run's folder, where runs are compared.

It never ends a run: on the first error it warns, and is silent from then on.
"""

import glob
import logging
import netrc
import os
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from cl_runner.errors import ConfigError
from cl_runner.identity import parts
from cl_runner.trackers import sending
from cl_runner.trackers.base import NullTracker, RunInfo
from cl_runner.trackers.journal import entries, read_journal

log = logging.getLogger("cl_runner")

PROBE_SECONDS = 3.0
INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0  # after that, `cl-runner sync` can send the rest from the run's folder
PREEMPTED_SECONDS = 5.0  # the same, if the machine is about to be taken away
GRACE_SECONDS = 5.0  # for wandb to stop at that limit by itself
PATIENCE_SECONDS = 30.0  # a row that takes longer is the last
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # of WANDB_MODE

P = ParamSpec("P")
Result = TypeVar("Result")


def guarded(
    method: Callable[Concatenate["Wandb", P], None],
) -> Callable[Concatenate["Wandb", P], None]:
    """Skip the method once W&B has failed; turn its first error into a warning."""

    def attempt(self: "Wandb", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.failure is None:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self._give_up(error)

    return attempt


def _without_marks(project: str) -> str:
    if set(project) & set("/\\#?%:"):
        raise PydanticCustomError("project", "text without any of / \\ # ? % :")
    return project


def _not_disabled(mode: object) -> object:
    if mode == "disabled":
        raise PydanticCustomError("mode", "'auto', 'online' or 'offline' (tracker=local does without W&B)")
    return mode


class Wandb(NullTracker):
    """Sends every row to Weights & Biases, with its `seq` as W&B's step.

    mode: "auto" is online if there is an API key and the server answers, else offline, unless WANDB_MODE decides.
    "online" does not probe the server first, but still falls back to offline if it fails.
    """

    def __init__(
        self,
        project: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_without_marks)] = "cl_runner",
        entity: str | None = None,
        mode: Annotated[Literal["auto", "online", "offline"], BeforeValidator(_not_disabled)] = "auto",
        tags: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = None,
        notes: str | None = None,
    ) -> None:
        """Raises ConfigError for a WANDB_MODE that wandb would refuse only when the run has begun."""
        if (variable := os.environ.get("WANDB_MODE", MODES[0])) not in MODES:
            raise ConfigError("WANDB_MODE", f"expected one of {', '.join(MODES)}, got {variable!r}")
        self.project, self.entity, self.mode = project, entity, mode
        self.tags, self.notes = list(tags or []), notes
        self.failure: str | None = None  # why it is silent
        self._wandb: Any = None  # the module
        self._run: Any = None  # wandb's run
        self._mode, self._url, self._folder = "", "", Path()  # the actual mode, the run's URL and folder
        self._next = 0  # the first seq that W&B does not have
        self._heard = 0  # the seq after the last row of the journal, whether W&B has it or not
        self._cut_off = False  # it was closed before W&B had everything
        self._name, self._scenario = "", ""
        self._within = False  # it is also evaluated within tasks
        self._accuracy: dict[str, list[list[float | None]]] = {}  # scenario -> the matrix so far
        self._environment: dict[str, str | None] = {}  # variables as they were

    @guarded
    def start(self, run: RunInfo) -> None:
        import wandb  # slow, and not needed to build or check a tracker

        wandb.setup(wandb.Settings(silent=True))  # the console tracker uses the terminal
        self._wandb, self._name, self._scenario, self._folder = wandb, run.name, run.scenario, run.folder
        self._within = bool(run.config.get("trainer", {}).get("eval_every"))
        self._keep_files_in(run.folder.resolve() / "wandb")
        earlier = sending.folders(run.folder, run.id)
        self._init(run, self._choose_mode(), earlier)
        self._next = self._run.starting_step
        for metric, step in (("train/*", "step"), ("within/*", "step"), ("eval/*", "task")):
            self._run.define_metric(step)
            self._run.define_metric(metric, step_metric=step)
        if self._next:
            self._send_pictures_of(earlier)
        if run.resumed:
            self._replay(run.folder)

    @guarded
    def step(self, row: dict[str, Any]) -> None:
        self._step(row)

    @guarded
    def evaluation(self, row: dict[str, Any]) -> None:
        self._evaluation(row)

    @guarded
    def task(self, row: dict[str, Any]) -> None:
        self._task(row)

    @guarded
    def finish(self, results: dict[str, Any]) -> None:
        """Send the summary for comparing runs, then one long table, which may fail on its own."""
        summary = dict(results["metrics"])
        for part in ("seconds", "peak_memory"):
            summary |= {f"{part}/{phase}": value for phase, value in results[part].items()}
        self._run.summary.update({name: value for name, value in summary.items() if value is not None})
        self._log_table(
            [(scenario, *entry) for scenario, rows in results["accuracy"].items() for entry in entries(rows)]
        )

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        """End W&B's run, which shows as preempted if it was marked and its exit status is not 0."""
        run, self._run = self._run, None
        try:
            if run is not None:
                if preempted:
                    run.mark_preempting()
                seconds = PREEMPTED_SECONDS if preempted else FINISH_SECONDS + GRACE_SECONDS
                within(seconds, run.finish, int(failed or preempted))
                if self._mode == "online" and self.failure is None:
                    sending.mark_sent(sending.folders(self._folder, run.id))
        except TimeoutError:
            self._cut_off = True
        except Exception as error:
            self._give_up(error)
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def line(self) -> str:
        """The run's URL, or how to upload it."""
        sync = f"cl-runner sync {shlex.quote(str(self._folder))}"
        if self.failure is not None:
            rest = f"; send what it has with: {sync}" if self._mode else ""
            return f"W&B: gave up ({self.failure}){rest}"
        if self._cut_off:
            return f"W&B: not all of it was sent; send the rest with: {sync}"
        if self._mode == "online":
            return f"W&B: {self._url}"
        return f"W&B: offline; send it with: {sync}" if self._mode == "offline" else ""

    def _keep_files_in(self, folder: Path) -> None:
        """Keep wandb from staging tables and pictures in the user's home."""
        for name, part in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(folder / part)

    def _choose_mode(self) -> str:
        settings = self._wandb.setup().settings
        asked = settings.mode if self.mode == "auto" and "WANDB_MODE" in os.environ else self.mode
        if asked not in ("auto", "online"):
            return asked
        if not has_key(settings):
            level = logging.INFO if asked == "auto" else logging.WARNING
            log.log(level, "W&B: no API key (`wandb login` stores one), so the run is kept offline")
            return "offline"
        if asked == "auto" and not answers(settings.base_url):
            log.warning("W&B: %s does not answer, so the run is kept offline", settings.base_url)
            return "offline"
        return "online"

    def _init(self, run: RunInfo, mode: str, earlier: list[Path]) -> None:
        try:
            self._run = self._open(run, mode, bool(earlier))
        except Exception as error:
            if mode != "online":
                raise
            log.warning("W&B: cannot go online, so the run is kept offline (%s)", _joined(error))
            self._wandb.teardown()  # the half-made run would block another with its id
            sending.mark_sent(sending.folders(run.folder, run.id)[len(earlier) :])  # it is empty
            self._run, mode = self._open(run, "offline", bool(earlier)), "offline"
        self._mode = mode
        self._url = self._run.url if mode == "online" else ""

    def _open(self, run: RunInfo, mode: str, resume: bool) -> Any:
        """Open W&B's run. Online, an earlier one is resumed at W&B's last row. Offline, that row is unknown, so every
        folder holds the whole run so far, and replaces what W&B has when it is uploaded."""
        strategy, stream, model = parts(run.config)
        wished = {
            "console": "off",
            "silent": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,  # a killed run then loses one second of rows, not fifteen
        }
        known = {name: value for name, value in wished.items() if name in self._wandb.Settings.model_fields}
        return self._wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            id=run.id,
            resume="allow" if resume and mode == "online" else None,
            reinit="finish_previous",
            dir=str(run.folder.resolve()),
            config=run.config,
            group=run.group,
            name=run.name,
            job_type=strategy,
            tags=list(dict.fromkeys([strategy, stream, model, run.scenario, *self.tags])),
            notes="\n\n".join(filter(None, [self.notes, run.command and f"`{run.command}`"])),
            settings=self._wandb.Settings(**known),
        )

    def _send_pictures_of(self, folders: list[Path]) -> None:
        """Send the earlier folders' pictures again: W&B may have a row without its picture."""
        for files in (folder / "files" for folder in folders):
            for picture in files.glob("media/images/**/*.png"):
                self._run.save(glob.escape(str(picture)), base_path=str(files), policy="now")

    def _replay(self, folder: Path) -> None:
        """Send the journal's rows that W&B lacks: a killed run's last seconds or, offline, all earlier rows."""
        for row in read_journal(folder):
            {"step": self._step, "eval": self._evaluation, "task": self._task}[row["kind"]](row)

    def _step(self, row: dict[str, Any]) -> None:
        values = {name: row[name] for name in ("task", "epoch", "step")}
        values |= {f"train/loss/{name}": value for name, value in row["loss"].items()}
        values |= {"train/lr": row["lr"], "train/images_per_second": row["timing"]["images_per_second"]}
        self._log(row["seq"], values)

    def _evaluation(self, row: dict[str, Any]) -> None:
        accuracies = {f"within/acc/task_{j}": value for j, value in enumerate(row["accuracy"][self._scenario])}
        self._log(row["seq"], {"task": row["task"], "step": row["step"], **accuracies})

    def _task(self, row: dict[str, Any]) -> None:
        for scenario, accuracies in row["accuracy"].items():
            unmeasured = [[None] * row["num_tasks"] for _ in range(row["num_tasks"])]
            self._accuracy.setdefault(scenario, unmeasured)[row["task"]] = accuracies
        accuracies = dict(enumerate(row["accuracy"][self._scenario]))
        values = {name: row[name] for name in ("task", "step") if name in row}  # older journals lack the step
        if row["seq"] >= self._next:  # they are slow to draw
            values |= self._pictures(row["metrics"])
        values |= {f"eval/acc/task_{j}": accuracy for j, accuracy in accuracies.items()}
        if self._within:  # the curves go through the tasks' ends
            values |= {f"within/acc/task_{j}": accuracy for j, accuracy in accuracies.items()}
        values |= {f"eval/{name}": value for name, value in row["metrics"].items()}
        values |= {f"eval/seconds/{phase}": value for phase, value in row["timing"]["seconds"].items()}
        self._log(row["seq"], values)

    def _pictures(self, metrics: dict[str, float | None]) -> dict[str, Any]:
        from cl_runner.trackers.figures import tiles, to_pixels  # matplotlib: not before the first step

        pictures = tiles(self._accuracy[self._scenario], self._name, metrics)
        return {
            f"eval/{name}": self._wandb.Image(to_pixels(picture))
            for name, picture in zip(("matrix", "forgetting_matrix"), pictures, strict=True)
        }

    def _log_table(self, rows: list[tuple[str, int, int, float]]) -> None:
        """Send a table: as an artifact, which needs the server now, or else as a file, which can wait like a row."""
        table = self._wandb.Table(columns=["scenario", "after_task", "task", "accuracy"], data=rows)
        try:
            if self._mode == "online" and not answers(self._run.settings.base_url):
                raise ConnectionError
            self._log(self._heard, {"accuracy": table})
        except Exception:
            table.bind_to_run(self._run, "accuracy", self._heard)
            self._log(self._heard, {"accuracy": table})

    def _log(self, seq: int, values: dict[str, Any]) -> None:
        """Send a row unless W&B has it: a run that went back to a checkpoint repeats rows.

        Raises TimeoutError if it took too long.
        """
        self._heard = seq + 1
        if seq < self._next:
            return
        began = time.monotonic()
        self._run.log({name: value for name, value in values.items() if value is not None}, step=seq, commit=True)
        self._next = seq + 1
        if (seconds := time.monotonic() - began) > PATIENCE_SECONDS:
            raise TimeoutError(f"a row took {seconds:.0f} seconds")

    def _give_up(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = f"{type(error).__name__}: {_joined(error)}"
            log.warning("W&B: gave up (%s); the run goes on, and its folder has everything", self.failure)


def _joined(error: Exception) -> str:
    """An error's message in one line: the first of pydantic's lines says only how many there are."""
    return " ".join(str(error).split())


def within(seconds: float, do: Callable[..., Result], *arguments: Any) -> Result:
    """What `do` returns. Raises what it raises, or TimeoutError if it takes too long; it then goes on in the
    background."""
    done: Future[Result] = Future()

    def work() -> None:
        try:
            done.set_result(do(*arguments))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result(seconds)


def out_of_reach() -> str | None:
    """Why nothing can be sent to W&B now, or None."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if not has_key(settings):
        return "there is no API key (`wandb login` stores one)"
    status = status_of(settings.base_url)
    if status is None:
        return f"{settings.base_url} does not answer"
    return f"{settings.base_url} answers with status {status}" if status >= 500 else None


def default_entity() -> str:
    """The user or team that W&B uses where none is named."""
    import wandb

    return wandb.Api().default_entity or ""


def has_key(settings: Any) -> bool:
    """Whether wandb finds a key without prompting: in its settings, the environment or ~/.netrc."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return stored.authenticators(urlsplit(settings.base_url).netloc) is not None


def answers(url: str) -> bool:
    """Whether a server answers: any HTTP status counts, even 404."""
    return status_of(url) is not None


def status_of(url: str) -> int | None:
    """The status a server answers with, or None; takes at most PROBE_SECONDS."""
    try:  # within: a DNS look-up obeys no timeout
        with within(PROBE_SECONDS, partial(urllib.request.urlopen, url, timeout=PROBE_SECONDS)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException, ValueError):
        return None
