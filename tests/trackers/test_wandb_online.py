"""The real client against the tests' own server, with and without faults."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_runner.trackers import sending
from cl_runner.trackers import wandb as wandb_tracker
from cl_runner.trackers.base import Many
from cl_runner.trackers.journal import JOURNAL, Journal, read_journal
from cl_runner.trackers.wandb import Wandb
from tests.trackers.loopback import Loopback, Received, reached
from tests.trackers.samples import journal_rows, results, run_info, tell

ROWS = journal_rows()
ALL_STEPS = list(range(len(ROWS) + 1))  # the last row holds the table


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with reached(WANDB__FILE_STREAM_TRANSMIT_INTERVAL="1") as server:  # seconds, not fifteen
        yield server


@pytest.fixture(autouse=True)
def in_good_order(server: Loopback) -> Iterator[None]:
    yield
    server.recover()


class Job:
    """One run, told to trackers as by the runner, in as many processes as it takes."""

    def __init__(self, server: Loopback, folder: Path) -> None:
        self.server, self.folder, self.id = server, folder, folder.name
        self.line = ""

    @property
    def received(self) -> Received:
        return self.server.runs[self.id]

    def carry_on(
        self, stop: int = len(ROWS), *, saved: int | None = None, failed: bool = False, preempted: bool = False
    ) -> None:
        """Resume from the checkpoint after `saved` rows, and go on to `stop`, by default the end."""
        journal, tracker = Journal(), Wandb()
        if saved is not None:
            lines = (self.folder / JOURNAL).read_bytes().splitlines(keepends=True)
            journal.rewind(sum(map(len, lines[:saved])))
        many = Many([journal, tracker])
        many.start(run_info(self.folder, resumed=saved is not None, run_id=self.id))
        tell(many, ROWS[saved or 0 : stop])
        if stop == len(ROWS):
            many.finish(results())
        many.close(failed, preempted)
        self.line = tracker.line()

    def send(self) -> str | None:
        """Do what `cl-runner sync` does, once wandb's process has written everything."""
        import wandb

        wandb.teardown()
        return sending.send(self.folder)

    def wait_for(self, reached: Callable[[Received], bool]) -> None:
        deadline = time.monotonic() + 60
        while self.id not in self.server.runs or not reached(self.received):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def job(server: Loopback, tmp_path: Path) -> Job:
    return Job(server, tmp_path)


def values(received: Received) -> list[dict[str, Any]]:
    """The rows without what wandb adds and what differs between processes."""
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in received.history]


@pytest.fixture(scope="module")
def whole(server: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run without faults."""
    job = Job(server, tmp_path_factory.mktemp("whole"))
    job.carry_on()
    return job


def test_a_run_arrives_whole(whole: Job) -> None:
    assert whole.received.steps == ALL_STEPS
    assert whole.received.state == "finished"
    assert whole.line == f"W&B: {whole.server.url}/somebody/cl_runner/runs/{whole.id}"


def test_a_run_arrives_with_its_whole_configuration_and_its_names(whole: Job) -> None:
    received = whole.received
    sent = {key: item["value"] for key, item in received.config.items() if key != "_wandb"}
    assert sent == run_info(whole.folder).config
    assert (received.name, received.group, received.job_type) == (
        "ewc strength=100 · split_digits · s0",
        "ewc-12ab34cd",
        "ewc",
    )
    assert (received.tags, received.notes) == (["ewc", "split_digits", "mlp", "class"], "`cl-runner strategy=ewc`")


def test_pictures_and_the_table_arrive(whole: Job) -> None:
    pictures = [
        row[f"eval/{name}"]
        for row in whole.received.history
        for name in ("matrix", "forgetting_matrix")
        if f"eval/{name}" in row
    ]
    assert len(pictures) == 2 * 3
    assert all(whole.received.files[picture["path"]][:4] == b"\x89PNG" for picture in pictures)
    table = json.loads(whole.received.files[whole.received.summary["accuracy"]["path"]])
    assert len(table["data"]) == 2 * 6


def test_the_summary_arrives_flat(whole: Job) -> None:
    expected = {name: value for name, value in results()["metrics"].items() if value is not None}
    summary = whole.received.summary
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert (summary["seconds/train"], summary["peak_memory/train"]) == (4.5, 123456)


def test_a_run_that_w_and_b_has_whole_is_not_sent_again(whole: Job) -> None:
    assert sending.unsent(whole.folder) == []


def test_a_resumed_run_leaves_no_gap_and_doubles_nothing(job: Job, whole: Job) -> None:
    job.carry_on(stop=8, failed=True)
    assert job.received.state == "failed"
    job.carry_on(saved=6)
    assert job.received.steps == ALL_STEPS
    assert values(job.received)[:-1] == values(whole.received)[:-1]
    assert job.received.state == "finished"


def test_a_run_that_ended_before_it_could_say_so_has_one_table(job: Job) -> None:
    job.carry_on()
    job.carry_on(saved=len(ROWS))
    assert job.received.steps == ALL_STEPS


def test_a_run_that_goes_on_offline_takes_the_place_of_what_was_sent(job: Job) -> None:
    job.carry_on(stop=8, failed=True)
    job.server.gone = True
    job.carry_on(saved=6)
    job.server.recover()
    assert job.line == f"W&B: offline; send it with: cl-runner sync {job.folder}"
    assert job.send() is None
    assert [row["_step"] for row in job.received.history] == ALL_STEPS
    assert job.received.state == "finished"


KILLED = """
import sys, time
from pathlib import Path
from cl_runner.trackers.base import Many
from cl_runner.trackers.journal import Journal
from cl_runner.trackers.wandb import Wandb
from tests.trackers.samples import journal_rows, run_info, tell

folder = Path(sys.argv[1])
many = Many([Journal(), Wandb()])
many.start(run_info(folder, run_id=folder.name))
tell(many, journal_rows()[:8])
time.sleep(600)
"""


@pytest.fixture(scope="module")
def killed(server: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that is killed while its pictures do not arrive, and resumed."""
    job = Job(server, tmp_path_factory.mktemp("killed"))
    server.status, server.failing = 500, "/store/"
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    command = [sys.executable, "-c", KILLED, str(job.folder)]
    child = subprocess.Popen(command, start_new_session=True, env=environment)
    job.wait_for(lambda received: len(received.steps) >= 6)
    os.killpg(child.pid, signal.SIGKILL)  # as a batch system does: wandb's own process too
    child.wait()
    server.recover()
    job.carry_on(saved=3)
    return job


def test_a_killed_run_leaves_no_gap_and_doubles_nothing(killed: Job, whole: Job) -> None:
    assert killed.received.steps == ALL_STEPS
    assert values(killed.received)[:-1] == values(whole.received)[:-1]
    assert killed.received.state == "finished"


def test_a_killed_run_has_all_its_pictures(killed: Job) -> None:
    pictures = [row["eval/matrix"]["path"] for row in killed.received.history if "eval/matrix" in row]
    assert len(pictures) == 3
    assert killed.received.files.keys() >= set(pictures)


def test_a_preempted_run_is_shown_as_such_and_goes_on(job: Job) -> None:
    job.carry_on(stop=8, preempted=True)
    assert job.received.state == "preempted"
    job.carry_on(saved=8)
    assert job.received.steps == ALL_STEPS
    assert job.received.state == "finished"


def test_a_preempted_run_does_not_wait_for_a_server_that_is_gone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "PREEMPTED_SECONDS", 0.5)
    job.server.failing, job.server.status = "file_stream", 500
    began = time.monotonic()
    job.carry_on(stop=3, preempted=True)
    assert time.monotonic() - began < 8
    assert job.line == f"W&B: not all of it was sent; send the rest with: cl-runner sync {job.folder}"


def test_a_slow_server_slows_nothing_down(job: Job) -> None:
    job.server.delay = 0.3
    tracker = Wandb()
    tracker.start(run_info(job.folder, run_id=job.id))
    began = time.monotonic()
    for row in range(50):
        tracker.step({**ROWS[0], "seq": row})
    seconds = time.monotonic() - began
    tracker.close()
    assert seconds < 1
    assert job.received.steps == list(range(50))


def test_a_server_that_fails_from_the_start_gets_the_run_later(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_tracker, "INIT_SECONDS", 1.0)
    job.server.status = 500
    job.carry_on()
    job.server.recover()
    assert job.line.startswith("W&B: offline")
    assert job.send() is None
    assert job.received.steps == ALL_STEPS
    assert job.received.state == "finished"


@pytest.mark.parametrize("fault", ["gone", "failing"])
def test_a_server_that_is_lost_on_the_way_gets_the_rest_later(
    job: Job, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_SECONDS", 1.0)
    tracker = Wandb()
    tracker.start(run_info(job.folder, run_id=job.id))
    tell(tracker, ROWS[:6])
    job.wait_for(lambda received: len(received.steps) == 6)
    if fault == "gone":
        job.server.gone = True
    else:
        job.server.status, job.server.failing = 500, "file"
    tell(tracker, ROWS[6:])
    tracker.finish(results())
    tracker.close()
    job.server.recover()
    assert tracker.line() == f"W&B: not all of it was sent; send the rest with: cl-runner sync {job.folder}"
    assert job.send() is None
    assert [row["_step"] for row in job.received.history] == ALL_STEPS
    assert job.received.state == "finished"


FOUR = [
    "-m",
    "stream=split_digits",
    "stream.num_tasks=2",
    "model=mlp",
    "model.widths=[12]",
    "strategy=finetune",
    "trainer.epochs=1",
    "seed=0,1,2,3",
    "tracker=wandb",
    "device=cpu",
]


def assert_four_whole_runs(server: Loopback, project: str, outputs: Path) -> None:
    runs = sorted((run for run in server.runs.values() if run.project == project), key=lambda run: run.name)
    journals = [[row["seq"] for row in read_journal(folder)] for folder in sorted(outputs.glob("*-s[0-3]-*"))]
    assert [run.name.rpartition(" · ")[2] for run in runs] == ["s0", "s1", "s2", "s3"]
    assert [run.state for run in runs] == ["finished"] * 4
    assert [run.steps[:-1] for run in runs] == journals
    assert len({run.group for run in runs}) == 1


def test_four_jobs_of_one_process_are_four_whole_runs_of_one_group(
    server: Loopback, tmp_path: Path, cl_runner: Callable[..., tuple[int, str]]
) -> None:
    said = cl_runner(*FOUR, "tracker.project=four", small=False)
    assert said[0] == 0, said
    assert_four_whole_runs(server, "four", tmp_path / "outputs")


def test_of_four_jobs_those_that_find_the_server_gone_are_sent_later(
    server: Loopback, tmp_path: Path, cl_runner: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closed = Wandb.close, []

    def close_and_lose_the_server(self: Wandb, *how: bool) -> None:
        close(self, *how)
        closed.append(self)
        server.gone = len(closed) >= 2

    monkeypatch.setattr(Wandb, "close", close_and_lose_the_server)
    said = cl_runner(*FOUR, "tracker.project=lost", small=False)
    assert said[0] == 0, said
    assert len([run for run in server.runs.values() if run.project == "lost"]) == 2
    server.recover()
    said = cl_runner("sync", "outputs", small=False)
    assert said[0] == 0, said
    assert_four_whole_runs(server, "lost", tmp_path / "outputs")
