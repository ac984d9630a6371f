"""Weights & Biases (https://docs.wandb.ai): a view of the run's folder, where runs are compared.

It never ends a run: whatever goes wrong here is told once, and from then on this tracker is silent.
"""

import contextlib
import logging
import netrc
import os
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec
from urllib.parse import urlsplit

from cl_runner.trackers.base import Null, RunInfo
from cl_runner.trackers.local import entries, read_journal

log = logging.getLogger(__name__)

PROBE_SECONDS = 3.0
INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0  # the rest of a run's data stays in its folder, for `wandb sync`
PATIENCE_SECONDS = 30.0  # a call that took longer was the last

P = ParamSpec("P")


def guarded(
    method: Callable[Concatenate["Wandb", P], None],
) -> Callable[Concatenate["Wandb", P], None]:
    """Do it unless W&B has failed before; an error, or the loss of patience, is a warning and the end of it."""

    def attempt(self: "Wandb", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.failure is not None:
            return
        began = time.monotonic()
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
        else:
            if time.monotonic() - began > PATIENCE_SECONDS:
                self._give_up(f"a call took {time.monotonic() - began:.0f} seconds")

    return attempt


class Wandb(Null):
    """Sends every row to Weights & Biases, under the row's `seq` as W&B's step.

    mode: "auto" is online if there is an API key and the server answers, else offline; WANDB_MODE decides where it is
    set. "online" does not ask the server first, and still goes offline when it fails.
    """

    def __init__(
        self,
        project: str = "cl_runner",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: list[str] | None = None,
        notes: str | None = None,
    ) -> None:
        self.project, self.entity, self.mode = project, entity, mode
        self.tags, self.notes = list(tags or []), notes
        self.failure: str | None = None  # why it went silent
        self._wandb: Any = None  # the module
        self._run: Any = None  # wandb's run
        self._mode, self._url, self._folder = "", "", Path()  # how it went, where it is seen, where wandb keeps it
        self._next = 0  # the first seq that W&B does not have
        self._name, self._scenario = "", ""
        self._accuracy: dict[str, list[list[float | None]]] = {}  # scenario -> the matrix so far
        self._environment: dict[str, str | None] = {}  # as it was

    @guarded
    def start(self, run: RunInfo) -> None:
        import wandb  # slow, and not needed to build or check a tracker

        self._wandb, self._name, self._scenario = wandb, run.name, run.scenario
        self._keep_files_in(run.folder.resolve() / "wandb")
        self._init(run, self._choose_mode())
        self._next = self._run.starting_step
        self._run.define_metric("task")
        self._run.define_metric("eval/*", step_metric="task")
        if run.resumed:
            self._replay(run.folder)

    @guarded
    def step(self, row: dict[str, Any]) -> None:
        self._step(row)

    @guarded
    def task(self, row: dict[str, Any]) -> None:
        self._task(row)

    @guarded
    def finish(self, results: dict[str, Any]) -> None:
        """The flat summary by which runs are compared, then one long table a scenario: a table can fail on its own."""
        summary = dict(results["metrics"])
        for part in ("seconds", "peak_memory"):
            summary |= {f"{part}/{phase}": value for phase, value in results[part].items()}
        self._run.summary.update({name: value for name, value in summary.items() if value is not None})
        matrices = {"accuracy": results["accuracy"][self._scenario]}
        matrices |= {f"accuracy/{scenario}": rows for scenario, rows in results["accuracy"].items()}
        columns = ["after_task", "task", "accuracy"]
        tables = {name: self._wandb.Table(columns=columns, data=entries(rows)) for name, rows in matrices.items()}
        self._log(self._next, tables)

    def close(self, failed: bool = False) -> None:
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def line(self) -> str:
        """Where the run is seen, or how to send it there."""
        path = shlex.quote(str(self._folder))
        sync = f"wandb sync --include-online {path}" if self._mode == "online" else f"wandb sync {path}"
        if self.failure is not None:
            rest = f"; send what it has with: {sync}" if self._mode else ""
            return f"W&B: gave up ({self.failure}){rest}"
        if self._mode == "online":
            return f"W&B: {self._url}"
        return f"W&B: offline; send it with: {sync}" if self._mode == "offline" else ""

    def _keep_files_in(self, folder: Path) -> None:
        """wandb would stage tables and pictures under the user's home."""
        for name, part in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(folder / part)

    def _choose_mode(self) -> str:
        settings = self._wandb.setup().settings
        asked = settings.mode if self.mode == "auto" and "WANDB_MODE" in os.environ else self.mode
        if asked not in ("auto", "online"):
            return asked
        if not has_key(settings):
            log.info("W&B: no API key (`wandb login` stores one), so the run is kept offline")
            return "offline"
        if asked == "auto" and not answers(settings.base_url):
            log.warning("W&B: %s does not answer, so the run is kept offline", settings.base_url)
            return "offline"
        return "online"

    def _init(self, run: RunInfo, mode: str) -> None:
        try:
            self._run = self._open(run, mode)
        except Exception as error:
            if mode != "online":
                raise
            log.warning("W&B: cannot go online, so the run is kept offline (%s)", error)
            self._wandb.teardown()  # the half-made run would stand in the way of one with its id
            self._run, mode = self._open(run, "offline"), "offline"
        self._mode, self._folder = mode, Path(self._run.dir).parent
        self._url = self._run.url if mode == "online" else ""

    def _open(self, run: RunInfo, mode: str) -> Any:
        wished = {
            "console": "off",
            "silent": True,  # the terminal is the console tracker's
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,  # a killed run then loses one second, not fifteen
        }
        known = {name: value for name, value in wished.items() if name in self._wandb.Settings.model_fields}
        return self._wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            id=run.id,
            resume="allow",
            reinit="finish_previous",
            dir=str(run.folder.resolve()),
            config=run.config,
            group=run.group,
            name=run.name,
            job_type=run.config["strategy"]["_target_"].rpartition(".")[2].lower(),
            tags=self.tags,
            notes=self.notes,
            settings=self._wandb.Settings(**known),
        )

    def _replay(self, folder: Path) -> None:
        """Send what the folder has and W&B does not: a killed run's last seconds or, offline, all that came before."""
        for row in read_journal(folder):
            if row["kind"] == "task":
                self._task(row)
            else:
                self._step(row)

    def _step(self, row: dict[str, Any]) -> None:
        values = {name: row[name] for name in ("task", "epoch", "step")}
        values |= {f"train/loss/{name}": value for name, value in row["loss"].items()}
        values |= {"train/lr": row["lr"], "train/images_per_second": row["timing"]["images_per_second"]}
        self._log(row["seq"], values)

    def _task(self, row: dict[str, Any]) -> None:
        for scenario, accuracies in row["accuracy"].items():
            unmeasured = [[None] * row["num_tasks"] for _ in range(row["num_tasks"])]
            self._accuracy.setdefault(scenario, unmeasured)[row["task"]] = accuracies
        if row["seq"] < self._next:
            return
        own = row["accuracy"][self._scenario]
        values = {"task": row["task"], "eval/matrix": self._picture(row["metrics"])}
        values |= {f"eval/acc/task_{j}": accuracy for j, accuracy in enumerate(own)}
        values |= {f"eval/{name}": value for name, value in row["metrics"].items()}
        values |= {f"eval/seconds/{phase}": value for phase, value in row["timing"]["seconds"].items()}
        self._log(row["seq"], values)

    def _picture(self, metrics: dict[str, float | None]) -> Any:
        from cl_runner.trackers.figures import accuracy_figure, to_pixels  # matplotlib: not before the first step

        return self._wandb.Image(to_pixels(accuracy_figure(self._accuracy[self._scenario], self._name, metrics)))

    def _log(self, seq: int, values: dict[str, Any]) -> None:
        if seq >= self._next:  # W&B would drop it, and say so on every row
            self._run.log({name: value for name, value in values.items() if value is not None}, step=seq, commit=True)
            self._next = seq + 1

    def _give_up(self, why: str) -> None:
        if self.failure is None:
            self.failure = why
            log.warning("W&B: gave up (%s); the run goes on, and its folder has everything", why)


def has_key(settings: Any) -> bool:
    """Whether wandb would find a key without asking for one: in its settings, the environment or ~/.netrc."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return stored.authenticators(urlsplit(settings.base_url).netloc) is not None


def answers(url: str) -> bool:
    """Whether a server is there: any HTTP answer counts, 404 too. Never takes longer than PROBE_SECONDS."""
    heard = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, HTTPException, ValueError):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
            heard.set()

    asking = threading.Thread(target=ask, daemon=True)  # no time limit holds a name look-up
    asking.start()
    asking.join(PROBE_SECONDS)
    return heard.is_set()
