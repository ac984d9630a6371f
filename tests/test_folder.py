import errno
import json
import os
import subprocess
import sys

import pytest

from cl_runner.errors import ConfigError
from cl_runner.folder import CannotWriteError, RunFolder, folders_below, write_atomically
from cl_runner.lock import FolderInUseError, Lock


@pytest.fixture
def full_disk(monkeypatch):
    """Make every fsync fail, as on a full disk."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_folder_that_is_not_there_is_pending(tmp_path):
    assert RunFolder(tmp_path / "nothing").state == "pending"


def test_a_run_with_results_whose_status_was_deleted_is_done(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    folder = RunFolder(tmp_path)
    assert (folder.state, folder.done) == ("done", True)


@pytest.mark.parametrize("state", ["pending", "done", "failed"])
def test_a_run_that_nobody_works_on_is_in_the_state_that_it_says(state, tmp_path):
    folder = RunFolder(tmp_path)
    folder.update_status(state=state)
    (tmp_path / "results.json").write_text("{}")
    assert folder.state == state


def test_a_run_whose_results_are_gone_is_not_done(tmp_path):
    folder = RunFolder(tmp_path)
    folder.update_status(state="done")
    assert (folder.state, folder.done) == ("pending", False)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_a_file_that_is_damaged_is_named(content, tmp_path):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(ConfigError, match=r"status\.json: expected JSON, got a damaged file"):
        assert RunFolder(tmp_path).state


def test_a_run_that_says_running_is_running_only_if_a_living_process_has_its_lock(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.start()
        assert folder.state == "running"
        assert folder.held is not None
        assert folder.held["pid"] == os.getpid()
    assert folder.state == "killed"
    assert folder.held is None


def test_a_run_that_has_just_been_taken_up_is_running_whatever_it_said_before(tmp_path):
    folder = RunFolder(tmp_path)
    folder.update_status(state="failed")
    with folder.locked():
        assert folder.state == "running"


def test_a_run_that_goes_on_keeps_its_name_and_how_far_it_came_and_forgets_its_failure(tmp_path):
    folder = RunFolder(tmp_path)
    folder.update_status(id="abc", tasks=2, step=70)
    folder.fail(ValueError("no"), "a traceback")
    folder.start(pid=1)
    status = folder.status
    assert (status["state"], status["id"], status["tasks"], status["step"], status["pid"]) == (
        "running",
        "abc",
        2,
        70,
        1,
    )
    assert not {"error", "traceback"} & set(status)


def test_a_stopped_run_is_pending_and_says_by_what(tmp_path):
    folder = RunFolder(tmp_path)
    folder.start()
    folder.stop("SIGUSR2")
    assert (folder.state, folder.status["stopped"]) == ("pending", "SIGUSR2")
    folder.start()
    assert "stopped" not in folder.status


def test_drafts_of_a_killed_process_are_gone_once_a_run_is_taken_up(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoint").mkdir()
    drafts = [tmp_path / ".status.json.123", tmp_path / "checkpoint" / ".last.pt.123"]
    for draft in drafts:
        draft.write_bytes(b"half")
    RunFolder(tmp_path).start()
    assert not any(draft.exists() for draft in drafts)
    assert (tmp_path / ".hydra").exists()


def test_a_full_disk_is_named_and_leaves_the_file_as_it_was(tmp_path, full_disk):
    file = tmp_path / "file"
    file.write_text("good")
    with pytest.raises(CannotWriteError, match=f"^cannot write {file}: No space left on device$"):
        write_atomically(file, "better")
    assert file.read_text() == "good"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_too_large_for_its_place_is_named_too(tmp_path):
    script = (
        "import resource, sys; from pathlib import Path; from cl_runner.folder import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomically(Path(sys.argv[1]), b'1' * 2000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "file"], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].endswith(f"cannot write {tmp_path}/file: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "run"
    with pytest.raises(CannotWriteError, match=f"cannot write {path}: Not a directory"), RunFolder(path).locked():
        pass


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path, reason, monkeypatch):
    def refuse(path, *_):
        raise OSError(reason, os.strerror(reason), str(path))

    monkeypatch.setattr(os, "open", refuse)
    words = f"cannot write {tmp_path}: {os.strerror(reason)}"
    with pytest.raises(CannotWriteError, match=words), RunFolder(tmp_path).locked():
        pass


def test_a_sign_of_life_that_cannot_be_written_does_no_harm(tmp_path, full_disk):
    RunFolder(tmp_path).beat(step=3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_moved_aside_while_it_is_being_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.start()
        with pytest.raises(FolderInUseError):
            RunFolder(tmp_path / "run").move_aside()
    assert folder.move_aside() == tmp_path / "run.1"
    assert json.loads((tmp_path / "run.1" / "status.json").read_text())["state"] == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["run.1"]
    assert Lock(tmp_path / "run.1").holder is None
    assert not (tmp_path / "run.1" / "lock").exists()


def test_of_two_commands_that_move_a_run_aside_at_once_one_moves_it(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.start()
    acquire = Lock.acquire

    def after_another(lock):
        if not (tmp_path / "run.1").exists():
            folder.path.rename(tmp_path / "run.1")
        acquire(lock)

    monkeypatch.setattr(Lock, "acquire", after_another)
    assert folder.move_aside() is None
    assert not (tmp_path / "run.2").exists()
    assert (tmp_path / "run.1" / "status.json").exists()


def test_runs_that_were_moved_aside_are_passed_over_but_not_folders_that_are_called_like_them(tmp_path):
    for name in ("grid/a", "grid/a.1", "grid.1/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "status.json").write_text("{}")
    found = [str(path.relative_to(tmp_path)) for path, names in folders_below(tmp_path) if "status.json" in names]
    assert found == ["grid/a", "grid.1/b"]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_folder_that_goes_while_it_is_listed_or_may_not_be_hides_no_other(error, tmp_path, monkeypatch):
    def listdir(path, listed=os.listdir):
        if path.name == "b":
            raise error(path)
        return listed(path)

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(os, "listdir", listdir)
    assert {path.name for path, _ in folders_below(tmp_path)} >= {"a", "c"}
