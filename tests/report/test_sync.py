import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.report import sync
from cl_runner.trackers.wandb import Wandb
from tests.trackers.loopback import Loopback, loopback
from tests.trackers.samples import journal_rows, run_info, tell


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with loopback() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # it reads the environment once a process
        yield server
        wandb.teardown()


@pytest.fixture
def root(server: Loopback, tmp_path: Path) -> Path:
    """Two runs that were kept offline, and one that was not tracked with W&B."""
    import wandb

    for run_id in ("first", "second"):
        tracker = Wandb(mode="offline")
        tracker.start(run_info(tmp_path / run_id, run_id=run_id))
        tell(tracker, journal_rows()[:3])
        tracker.close()
    wandb.teardown()  # only then is all of it in the files
    (tmp_path / "third").mkdir()
    return tmp_path


def test_a_run_that_was_made_again_is_not_sent_beside_its_successor(
    server: Loopback, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "second").rename(root / "first.1")
    assert sync.main([str(root), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"to send  {root / 'first'}\n"
    assert sync.main([str(root / "first.1"), "--dry-run"]) == 0  # asked for by its name
    assert capsys.readouterr().out == f"to send  {root / 'first.1'}\n"


def test_every_run_that_w_and_b_lacks_is_sent_and_named(
    server: Loopback, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync.main([str(root)]) == 0
    assert capsys.readouterr().out == f"sent     {root / 'first'}\nsent     {root / 'second'}\n"
    assert {name: run.steps for name, run in server.runs.items()} == {"first": [0, 1, 2], "second": [0, 1, 2]}
    assert sync.main([str(root)]) == 0
    assert capsys.readouterr().out == f"nothing to send below {root}\n"


def test_one_run_can_be_sent_alone(server: Loopback, root: Path) -> None:
    assert sync.main([str(root / "second")]) == 0
    assert list(server.runs) == ["second"]


def test_a_dry_run_only_says_what_it_would_send(
    server: Loopback, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync.main([str(root), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"to send  {root / 'first'}\nto send  {root / 'second'}\n"
    assert server.runs == {}


def test_a_run_that_cannot_be_sent_is_named_with_its_reason(
    server: Loopback, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (log,) = (root / "first").glob("wandb/offline-run-*/*.wandb")
    log.write_bytes(b"no log of wandb's")
    assert sync.main([str(root)]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"^failed   {root / 'first'}: .*\w", said)
    assert f"sent     {root / 'second'}\n1 of 2 runs were not sent" in said
    assert list(server.runs) == ["second"]


def test_a_run_that_is_going_on_is_left_alone(server: Loopback, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = RunFolder(root / "first")
    with running.locked():
        running.start()
        assert sync.main([str(root)]) == 0
    assert f"running  {root / 'first'} (it will send what it has)\n" in capsys.readouterr().out
    assert list(server.runs) == ["second"]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sync: expected a folder, got .*nowhere"):
        sync.main([str(tmp_path / "nowhere")])


def test_without_a_server_there_is_one_line(server: Loopback, root: Path) -> None:
    server.gone = True
    with pytest.raises(ConfigError, match=f"expected a W&B server to send 2 runs to, but {server.url} does not answer"):
        sync.main([str(root)])


def test_with_a_server_that_fails_there_is_one_line(server: Loopback, root: Path) -> None:
    server.status = 503
    with pytest.raises(ConfigError, match=f"but {server.url} answers with status 503"):
        sync.main([str(root)])


def test_without_a_key_there_is_one_line(server: Loopback, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(root / "none"))
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"but there is no API key \(`wandb login` stores one\)"):
        sync.main([str(root)])
