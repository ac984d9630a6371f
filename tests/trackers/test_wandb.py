"""The real client, without a network: what it wrote is read back with wandb's own reader."""

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cl_runner.errors import ConfigError
from cl_runner.trackers import sending
from cl_runner.trackers.base import Many
from cl_runner.trackers.journal import Journal
from cl_runner.trackers.wandb import Wandb, answers, has_key, within
from tests.trackers.samples import ROWS_BEFORE_THE_END_OF_TASK_1, journal_rows, results, run_info, tell

BASE_URL = "https://api.wandb.ai"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@dataclass
class Written:
    """What one run left in its .wandb file."""

    path: Path
    records: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.all("history")]

    @property
    def summary(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for record in self.all("summary"):
            merged |= record.get("update", {})
        return merged


def read(tracker: Wandb) -> Written:
    """Read back what the command in the tracker's line, `cl-runner sync`, would send last."""
    import wandb

    wandb.teardown()  # only then is all of it in the files
    path = sending.folders(Path(shlex.split(tracker.line())[-1]))[-1]
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.splitlines()
    return Written(path, [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, Written]:
    """Two runs of one process: one was stopped and resumed from an earlier checkpoint, the other failed."""
    folder, rows = tmp_path_factory.mktemp("it is a=run"), journal_rows()
    local, first = Journal(), Wandb(mode="offline")
    many = Many([local, first])
    many.start(run_info(folder))
    tell(many, rows[:ROWS_BEFORE_THE_END_OF_TASK_1])
    offset = local.offset
    tell(many, rows[ROWS_BEFORE_THE_END_OF_TASK_1 : ROWS_BEFORE_THE_END_OF_TASK_1 + 4])
    many.close(failed=True)

    resumed = Wandb(mode="offline", tags=["a tag"], notes="a note")
    local = Journal()
    local.rewind(offset)
    many = Many([local, resumed])
    many.start(run_info(folder, resumed=True))
    tell(many, rows[ROWS_BEFORE_THE_END_OF_TASK_1:])
    many.finish(results())
    many.close()

    other = Wandb(mode="offline")
    other.start(run_info(tmp_path_factory.mktemp("other"), run_id="other1"))
    tell(other, rows[:3])
    other.close(failed=True)
    assert (first.failure, resumed.failure, other.failure) == (None, None, None)
    return read(resumed), read(other)


def test_every_row_is_there_once_and_in_order_though_the_run_was_resumed(written: tuple[Written, Written]) -> None:
    rows = journal_rows()
    history = written[0].history
    assert [row["_step"] for row in history] == list(range(len(rows) + 1))  # the last one holds the table
    assert [row.get("step") for row in history[:-1]] == [row.get("step") for row in rows]


def test_a_step_row_has_its_losses_and_its_rate(written: tuple[Written, Written]) -> None:
    row = written[0].history[6]
    told = {name: value for name, value in row.items() if not name.startswith("_")}
    assert told == {
        "task": 1,
        "epoch": 0,
        "step": 6,
        "train/loss/total": 1.5,
        "train/loss/task": 1.0,
        "train/loss/ewc": 0.5,
        "train/lr": 0.1,
        "train/images_per_second": 1234.5,
    }


def test_a_task_row_has_each_tasks_accuracy_and_the_metrics_so_far(written: tuple[Written, Written]) -> None:
    row = written[0].history[9]
    assert (row["task"], row["eval/acc/task_0"], row["eval/acc/task_1"]) == (1, 0.61, 0.8)
    assert "eval/acc/task_2" not in row
    assert row["eval/average_accuracy"] == pytest.approx(0.705)
    assert row["eval/average_forgetting/task"] == pytest.approx(0.29)


def test_an_evaluation_within_a_task_has_each_tasks_accuracy(written: tuple[Written, Written]) -> None:
    row = {name: value for name, value in written[0].history[12].items() if not name.startswith("_")}
    within = {"within/acc/task_0": 0.3, "within/acc/task_1": 0.4, "within/acc/task_2": 0.5}
    assert row == {"task": 2, "step": 10, **within}
    assert "within/acc/task_0" not in written[0].history[4]  # at the end of a task: this run has no trainer.eval_every


def test_where_a_run_is_evaluated_within_tasks_their_ends_are_on_the_same_curves(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    info = run_info(tmp_path)
    tracker = Wandb(mode="offline")
    tracker.start(replace(info, config=info.config | {"trainer": {"eval_every": 2}}))
    tracker._run.log = lambda values, step, commit: told.append(values)
    tell(tracker, journal_rows()[:5])
    tracker.close()
    assert (told[4]["step"], told[4]["within/acc/task_0"], told[4]["eval/acc/task_0"]) == (4, 0.9, 0.9)


def test_a_journal_from_before_task_rows_had_a_step_is_sent_too(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    tracker = Wandb(mode="offline")
    tracker.start(run_info(tmp_path))
    tracker._run.log = lambda values, step, commit: told.append(values)
    tell(tracker, [{name: value for name, value in row.items() if name != "step"} for row in journal_rows()[4:5]])
    tracker.close()
    assert tracker.failure is None
    assert told[0]["task"] == 0


@pytest.mark.parametrize("name", ["matrix", "forgetting_matrix"])
def test_each_task_brings_pictures_of_one_size(written: tuple[Written, Written], name: str) -> None:
    pictures = [row for row in written[0].history if f"eval/{name}.path" in row]
    assert [(row[f"eval/{name}.width"], row[f"eval/{name}.height"]) for row in pictures] == [(800, 800)] * 3
    assert all((written[0].path / "files" / row[f"eval/{name}.path"]).is_file() for row in pictures)


def test_curves_run_over_tasks_and_over_steps(written: tuple[Written, Written]) -> None:
    metrics = {metric.get("glob_name"): metric.get("step_metric") for metric in written[0].all("metric")}
    assert (metrics["eval/*"], metrics["train/*"], metrics["within/*"]) == ("task", "step", "step")


def test_the_summary_has_every_defined_metric_under_its_flat_name(written: tuple[Written, Written]) -> None:
    summary = written[0].summary
    expected = results()["metrics"]
    for name, value in expected.items():
        assert summary.get(name) == (None if value is None else pytest.approx(value)), name
    assert summary["seconds/train"] == 4.5


def test_the_matrices_come_as_one_long_table(written: tuple[Written, Written]) -> None:
    table = json.loads((written[0].path / "files" / written[0].summary["accuracy.path"]).read_text())
    assert table["columns"] == ["scenario", "after_task", "task", "accuracy"]
    assert table["data"] == [
        [scenario, i, j, value]
        for scenario, rows in results()["accuracy"].items()
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if j <= i
    ]


def test_a_run_is_filed_under_its_names(written: tuple[Written, Written]) -> None:
    run = written[0].all("run")[0]
    assert (run["run_id"], run["run_group"], run["job_type"]) == ("abc123", "ewc-12ab34cd", "ewc")
    assert (run["display_name"], run["project"]) == ("ewc strength=100 · split_digits · s0", "cl_runner")
    assert run["tags"] == ["ewc", "split_digits", "mlp", "class", "a tag"]
    assert run["notes"] == "a note\n\n`cl-runner strategy=ewc`"


def test_a_run_brings_its_whole_configuration(written: tuple[Written, Written]) -> None:
    update = written[0].all("run")[0]["config"]["update"]
    assert {name: value for name, value in update.items() if name != "_wandb"} == run_info(Path()).config


def test_two_runs_of_one_process_are_two_runs(written: tuple[Written, Written]) -> None:
    assert [run.all("run")[0]["run_id"] for run in written] == ["abc123", "other1"]
    assert [row["_step"] for row in written[1].history] == [0, 1, 2]


def test_how_a_run_ended_is_passed_on(written: tuple[Written, Written]) -> None:
    assert [run.all("exit")[-1].get("exit_code", 0) for run in written] == [0, 1]


def test_a_client_that_raises_ends_no_run_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def log(*args: Any, **kwargs: Any) -> None:
        asked.append(kwargs["step"])
        raise OSError("no space left")

    tracker = Wandb(mode="offline")
    tracker.start(run_info(tmp_path))
    monkeypatch.setattr(tracker._run, "log", log)
    with caplog.at_level(logging.WARNING, "cl_runner"):
        tell(tracker, journal_rows())
        tracker.finish(results())
        tracker.close()
    assert asked == [0]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("cl_runner")] == [
        "W&B: gave up (OSError: no space left); the run goes on, and its folder has everything"
    ]
    assert tracker.line().startswith("W&B: gave up (OSError: no space left); send what it has with: cl-runner sync ")
    assert "WANDB_DATA_DIR" not in os.environ


def test_what_wandb_raises_at_the_start_is_told_in_one_line(tmp_path: Path) -> None:
    tracker = Wandb(mode="offline", tags=[80 * "x"])
    tracker.start(run_info(tmp_path))
    tracker.close()
    assert "ValidationError: 1 validation error" in tracker.line()
    assert "64 characters" in tracker.line()
    assert "\n" not in tracker.line()


def test_a_mode_that_wandb_does_not_know_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigError, match="WANDB_MODE: expected one of online, offline, .*, got 'offlin'"):
        Wandb()


def test_a_client_that_became_slow_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def log(values: dict[str, Any], step: int, commit: bool) -> None:
        asked.append(step)
        time.sleep(0.02)

    monkeypatch.setattr("cl_runner.trackers.wandb.PATIENCE_SECONDS", 0.01)
    tracker = Wandb()
    tracker._run = SimpleNamespace(log=log)
    tell(tracker, journal_rows()[:3])
    assert asked == [0]
    assert tracker.line() == "W&B: gave up (TimeoutError: a row took 0 seconds)"


def test_a_tracker_is_made_without_importing_wandb_or_torch() -> None:
    made = (
        "import sys; from cl_runner.trackers.wandb import Wandb; Wandb(); print({'wandb', 'torch'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


def test_without_its_package_wandb_is_told_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Wandb()
    tracker.start(run_info(tmp_path))
    tell(tracker, journal_rows())
    tracker.finish(results())
    tracker.close()
    assert tracker.line().startswith("W&B: gave up (ModuleNotFoundError")


def test_with_a_key_and_no_server_a_run_is_kept_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    wandb.teardown()  # it reads the environment once a process
    began = time.monotonic()
    tracker = Wandb()
    tracker.start(run_info(tmp_path))
    seconds = time.monotonic() - began
    tracker.close()
    wandb.teardown()
    assert tracker.line().startswith("W&B: offline; send it with: cl-runner sync ")
    assert str(tmp_path) in tracker.line()
    assert seconds < 6


@pytest.mark.parametrize(("mode", "level"), [("auto", "INFO"), ("online", "WARNING")])
def test_who_asked_for_online_is_warned_where_there_is_no_key(
    mode: Literal["auto", "online"],
    level: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import wandb

    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()  # it reads the environment once a process
    tracker = Wandb(mode=mode)
    with caplog.at_level("INFO"):
        tracker.start(run_info(tmp_path))
    tracker.close()
    wandb.teardown()
    (record,) = [record for record in caplog.records if "no API key" in record.message]
    assert record.levelname == level


def test_a_server_that_takes_the_call_and_says_nothing_is_given_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - began < 4


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def not_found() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_answers_404_is_there(not_found: str) -> None:
    assert answers(not_found)


def test_an_address_that_is_none_is_not_there() -> None:
    assert not answers("no address")


def test_what_is_late_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.05, time.sleep, 2)
    assert time.monotonic() - began < 1


def test_what_fails_in_time_says_why() -> None:
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: print(1 / 0))


@pytest.mark.parametrize(("host", "found"), [("api.wandb.ai", True), ("example.org", False)])
def test_a_stored_key_counts_for_its_own_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, found: bool
) -> None:
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key(SimpleNamespace(api_key=None, base_url=BASE_URL)) is found


def test_a_key_in_the_settings_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert has_key(SimpleNamespace(api_key="0" * 40, base_url=BASE_URL))
    assert not has_key(SimpleNamespace(api_key=None, base_url=BASE_URL))
