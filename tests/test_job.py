import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest

from cl_runner.checkpoint import load
from cl_runner.errors import ConfigError
from cl_runner.folder import CannotWriteError, RunFolder
from cl_runner.interrupt import Stopped
from cl_runner.job import carry_out
from cl_runner.lock import FolderInUseError
from cl_runner.rerun import move_aside
from cl_runner.trackers.base import NullTracker
from tests.test_resume import OFTEN, assert_equal_runs, experiment, without_timing

pytestmark = pytest.mark.usefixtures("no_picture")

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, "-m", "cl_runner", "model=mlp", "model.widths=[12]", "tracker=local", "device=cpu"]
STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers_as_they_were():
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_step(experiment, step, action):
    """Call `action` in this process's `step`-th step."""
    strategy, left = experiment.strategy, [step]
    after_step = strategy.after_step

    def counted(batch, output):
        after_step(batch, output)
        left[0] -= 1
        if left[0] == 0:
            action()

    strategy.after_step = counted
    return experiment


def in_task(experiment, index, action):
    """Call `action` while a task is being consolidated."""
    strategy = experiment.strategy
    after_task = strategy.after_task

    def called(task):
        if task.index == index:
            action()
        after_task(task)

    strategy.after_task = called
    return experiment


def send(number):
    os.kill(os.getpid(), number)


def finished(experiment):
    carry_out(experiment)
    return RunFolder(experiment.folder).results, experiment.folder


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its results and its folder."""
    return finished(experiment(tmp_path_factory.mktemp("whole"), "strategy=finetune", *OFTEN))


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_lets_the_step_end_saves_and_says_where_the_run_goes_on(number, tmp_path, whole):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN[1:])
    folder = RunFolder(make().folder)
    with pytest.raises(Stopped, match="goes on at task 1, step 14"):
        carry_out(at_step(make(), 14, partial(send, number)))
    assert (folder.state, folder.status["stopped"], folder.status["step"]) == ("pending", number.name, 14)
    assert not (folder.path / "lock").exists()
    assert_equal_runs(whole, finished(make()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_a_task_is_consolidated_ends_the_run_as_far_as_it_was_saved(number, tmp_path, whole):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN)
    with pytest.raises(Stopped, match="goes on at task 1"):
        carry_out(in_task(make(), 1, partial(send, number)))
    assert RunFolder(make().folder).state == "pending"
    assert_equal_runs(whole, finished(make()))


def test_a_signal_before_a_run_has_read_its_checkpoint_loses_nothing(tmp_path, whole, monkeypatch):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN)
    with monkeypatch.context() as patch:
        patch.setattr("cl_runner.run.seed_all", lambda _: send(signal.SIGTERM))
        with pytest.raises(Stopped, match="begins anew"):
            carry_out(make())
    with pytest.raises(Stopped, match="goes on at task 1, step 14"):
        carry_out(at_step(make(), 14, partial(send, signal.SIGTERM)))
    with monkeypatch.context() as patch:
        patch.setattr("cl_runner.run.seed_all", lambda _: send(signal.SIGTERM))
        with pytest.raises(Stopped, match="goes on where it was saved"):
            carry_out(make())
    assert_equal_runs(whole, finished(make()))


def test_a_launcher_is_handed_the_signal_when_the_folder_is_free(tmp_path, whole):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN)
    seen = []
    folder = RunFolder(make().folder)
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append((number, folder.state, folder.held)))
    with pytest.raises(Stopped):
        carry_out(at_step(make(), 14, partial(send, signal.SIGUSR2)))
    assert seen == [(signal.SIGUSR2, "pending", None)]
    assert_equal_runs(whole, finished(make()))


def test_a_run_whose_launcher_passes_over_sigterm_saves_and_goes_on(tmp_path, whole):
    seen = []
    made = experiment(tmp_path, "strategy=finetune", *OFTEN[1:])
    checkpoint = made.folder / "checkpoint" / "last.pt"
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(checkpoint.exists()))
    assert_equal_runs(whole, finished(at_step(made, 5, partial(send, signal.SIGTERM))))
    assert seen == [True]


def test_trackers_are_told_that_a_stopped_run_will_go_on_and_that_a_failed_one_failed(tmp_path):
    closed = []

    class Listening(NullTracker):
        def close(self, failed=False, preempted=False):
            closed.append((failed, preempted))

    def fail():
        raise ValueError("no")

    for error, action in ((Stopped, partial(send, signal.SIGUSR2)), (ValueError, fail), (None, lambda: None)):
        made = at_step(experiment(tmp_path, "strategy=finetune"), 3, action)
        made.tracker = Listening()
        if error:
            with pytest.raises(error):
                carry_out(made)
        else:
            carry_out(made)
    assert closed == [(False, True), (True, False), (False, False)]


@pytest.mark.parametrize(
    ("action", "state"),
    [(partial(send, signal.SIGINT), "pending"), (partial(int, "x"), "failed"), (lambda: None, "done")],
    ids=["stopped", "failed", "done"],
)
def test_ctrl_c_while_a_run_says_how_it_ended_does_not_change_that(action, state, tmp_path):
    class Slow(NullTracker):
        def close(self, failed=False, preempted=False):
            send(signal.SIGINT)

    made = at_step(experiment(tmp_path, "strategy=finetune"), 3, action)
    made.tracker = Slow()
    with pytest.raises(Stopped):
        carry_out(made)
    assert RunFolder(made.folder).state == state


def test_a_second_ctrl_c_does_not_keep_a_stopped_run_from_noting_that_it_was_stopped(tmp_path, monkeypatch):
    made = at_step(experiment(tmp_path, "strategy=finetune"), 3, partial(send, signal.SIGINT))
    update = RunFolder.update_status

    def impatient(folder, **values):
        if values.get("state") == "pending":
            send(signal.SIGINT)
        update(folder, **values)

    monkeypatch.setattr(RunFolder, "update_status", impatient)
    with pytest.raises(Stopped):
        carry_out(made)
    assert RunFolder(made.folder).state == "pending"


@pytest.mark.parametrize("begun", [False, True])
def test_what_only_building_reveals_leaves_no_folder_behind_unless_the_run_had_begun(begun, tmp_path, monkeypatch):
    def refused(*_):
        raise ConfigError("model.pretrained", "no such weights")

    wanted = experiment(tmp_path, "strategy=finetune")
    if begun:
        with pytest.raises(Stopped):
            carry_out(at_step(experiment(tmp_path, "strategy=finetune"), 1, partial(send, signal.SIGINT)))
    monkeypatch.setattr("cl_runner.job.run", refused)
    with pytest.raises(ConfigError, match="no such weights"):
        carry_out(wanted)
    assert wanted.folder.exists() is begun


def test_a_run_that_failed_says_why_where_anyone_looks(tmp_path):
    def fail():
        raise ValueError("this is why")

    made = at_step(experiment(tmp_path, "strategy=finetune"), 3, fail)
    folder = RunFolder(made.folder)
    with pytest.raises(ValueError, match="this is why"):
        carry_out(made)
    status = folder.status
    assert (folder.state, status["error"]) == ("failed", "ValueError: this is why")
    assert 'raise ValueError("this is why")' in status["traceback"]
    assert 'raise ValueError("this is why")' in (folder.path / "run.log").read_text()


def test_a_running_run_tells_where_it_is_and_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_runner.run.BEAT", 0.05)
    made = experiment(tmp_path, "strategy=finetune")
    folder, seen = RunFolder(made.folder), []

    def look():
        began = folder.status["heartbeat"]
        time.sleep(0.3)
        seen.append((folder.state, folder.status, folder.status["heartbeat"] - began))

    carry_out(at_step(made, 14, look))
    ((state, status, later),) = seen
    assert state == "running"
    assert later > 0
    expected = {"pid": os.getpid(), "task": 1, "tasks": 1, "num_tasks": 5, "step": 13, "hash": made.hash}
    assert {name: status[name] for name in expected} == expected
    assert {"id", "host", "groups", "started", "environment"} <= set(status)
    assert status["command"] == ""  # what the process was started with has not asked for this run
    assert folder.status["tasks"] == 5


def test_a_run_is_saved_in_the_middle_of_a_task_when_it_is_time(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_runner.run.BEAT", 0.05)
    made = experiment(tmp_path, "strategy=finetune", "trainer.checkpoint_seconds=1")
    seen = []
    at_step(made, 14, partial(time.sleep, 1.2))  # in task 1; its next step is the first to see that it is time
    at_step(made, 15, lambda: seen.append(load(made.folder, made.hash, made.device)))
    carry_out(made)
    assert seen[0]["position"] == {"tasks": 1, "phase": "learn", "steps": 14, "rows": 2}


def test_a_run_that_a_living_process_is_at_is_left_alone(tmp_path):
    made = experiment(tmp_path, "strategy=finetune")
    folder = RunFolder(made.folder)

    def another():
        before = contents(folder.path)
        with pytest.raises(FolderInUseError, match=f"{folder.path}: is being run by process {os.getpid()} on"):
            carry_out(experiment(tmp_path, "strategy=finetune"))
        again = experiment(tmp_path, "strategy=finetune", "rerun=true")
        with pytest.raises(FolderInUseError):
            move_aside(again)
        assert contents(folder.path) == before

    carry_out(at_step(made, 14, another))
    assert folder.done


def test_a_full_disk_ends_a_run_with_a_line_and_loses_nothing(tmp_path, whole, monkeypatch):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN)
    folder = RunFolder(make().folder)
    fsync, full = os.fsync, []

    def failing(descriptor):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CannotWriteError, match=f"^cannot write {folder.path}/.*: No space left on device$"):
        carry_out(at_step(make(), 14, lambda: full.append(True)))
    assert not [path for path in folder.path.rglob(".*.*") if ".hydra" not in path.parts]  # no drafts
    assert folder.state == "killed"
    full.clear()
    assert_equal_runs(whole, finished(make()))


def test_a_journal_that_cannot_be_written_ends_a_run_with_a_line(tmp_path, whole, monkeypatch):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN[1:])
    made = make()
    with pytest.raises(CannotWriteError, match=r"steps.jsonl: No space left on device$"):
        carry_out(at_step(made, 14, partial(_fill, made.folder / "steps.jsonl")))
    assert RunFolder(made.folder).state == "failed"
    assert_equal_runs(whole, finished(make()))


def _fill(journal):
    """Redirect the journal's open descriptor to a device that is always full."""
    (descriptor,) = [
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if link.exists() and link.resolve() == journal.resolve()
    ]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)


def test_a_signal_that_comes_when_all_is_done_is_for_what_comes_next(tmp_path, monkeypatch):
    made = experiment(tmp_path, "strategy=finetune")
    update = RunFolder.update_status

    def late(folder, **values):
        if values.get("state") == "done":
            send(signal.SIGINT)
        update(folder, **values)

    monkeypatch.setattr(RunFolder, "update_status", late)
    with pytest.raises(KeyboardInterrupt):
        carry_out(made)
    assert RunFolder(made.folder).done


def test_a_signal_that_comes_while_a_failure_is_noted_does_not_hide_it(tmp_path, monkeypatch):
    made = experiment(tmp_path, "strategy=finetune")
    update = RunFolder.update_status

    def late(folder, **values):
        if values.get("state") == "failed":
            send(signal.SIGINT)
        update(folder, **values)

    def fail():
        raise RuntimeError("boom")

    monkeypatch.setattr(RunFolder, "update_status", late)
    with pytest.raises(RuntimeError, match="boom"):
        carry_out(at_step(made, 3, fail))
    assert RunFolder(made.folder).state == "failed"


def test_a_run_that_has_not_begun_is_not_said_to_be_killed(tmp_path, monkeypatch):
    made = experiment(tmp_path, "strategy=finetune")

    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cl_runner.job.place_of", full)
    with pytest.raises(OSError, match="No space left"):
        carry_out(made)
    assert RunFolder(made.folder).state == "pending"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_says_how_to_go_on_and_ends_as_is_usual(number, status, tmp_path):
    command = [*CLI, "strategy=finetune", "trainer.epochs=10000", "trainer.log_every=1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(journal.stat().st_size for journal in tmp_path.glob("outputs/*/steps.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status, out + error
    (line,) = error.strip().splitlines()
    assert line.startswith("cl-runner: stopped; the same command goes on at task 0, step ")
    (folder,) = [path for path in (tmp_path / "outputs").iterdir() if path.is_dir()]
    assert json.loads((folder / "status.json").read_text())["state"] == "pending"
    assert len(without_timing(folder)) > 0


KILLED_BETWEEN_TWO_RENAMES = """
import os, signal, sys
from pathlib import Path
from cl_runner.__main__ import main
replace, left = Path.replace, [int(sys.argv.pop(1))]
def dying(self, target):
    if self.name.startswith(".last.pt"):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
main()
"""


def test_a_process_killed_while_it_saves_loses_nothing(tmp_path, whole):
    """Between two renames, when there is no last checkpoint but a whole draft and the one before it."""
    words = ["model=mlp", "model.widths=[12]", "model.dropout=0.1", "trainer.epochs=1", "tracker=local", "device=cpu"]
    words += ["strategy=finetune", *OFTEN, f"output_root={tmp_path}"]
    command = [sys.executable, "-c", KILLED_BETWEEN_TWO_RENAMES, "7", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    made = experiment(tmp_path, "strategy=finetune", *OFTEN)
    assert RunFolder(made.folder).state == "killed"
    assert {path.name.partition(".pt")[0] for path in (made.folder / "checkpoint").iterdir()} == {".last", "previous"}
    assert_equal_runs(whole, finished(made))


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(tmp_path):
    command = [sys.executable, "tests/soak.py", "--kills", "1", "--strategies", "ewc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_an_earlier_job_is_left_when_the_next_begins(tmp_path):
    earlier = experiment(tmp_path, "strategy=finetune", "seed=1")
    carry_out(earlier)
    model = weakref.ref(earlier.strategy.model)
    del earlier
    gone = []
    gc.disable()
    try:
        carry_out(at_step(experiment(tmp_path, "strategy=finetune"), 1, lambda: gone.append(model() is None)))
    finally:
        gc.enable()
    assert gone[0]
