import logging
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cl_runner.streams.cache import DataSet, cached
from cl_runner.streams.folder import ImageFolder
from tests.streams.data import write_folder

DATA = DataSet(
    torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4),
    torch.tensor([0, 1]),
    torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4),
    torch.tensor([1]),
)


class Builder:
    """Counts its calls."""

    calls = 0

    def __call__(self) -> DataSet:
        self.calls += 1
        return DATA


def same(one: DataSet, other: DataSet) -> bool:
    return all(torch.equal(values, vars(other)[name]) for name, values in vars(one).items())


def the_file(root: Path) -> Path:
    (path,) = (root / ".cl_runner").iterdir()
    return path


def test_what_was_built_once_is_read_afterwards(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        assert same(cached(tmp_path, "birds-0", build), DATA)
    assert build.calls == 1


def test_another_key_is_another_file(tmp_path: Path) -> None:
    build = Builder()
    cached(tmp_path, "birds-0", build)
    cached(tmp_path, "birds-1", build)
    assert build.calls == 2


def flip_the_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def make_foreign(path: Path) -> None:
    path.write_text("something else")


@pytest.mark.parametrize("damage", [flip_the_last_byte, cut_short, make_foreign])
def test_a_damaged_file_is_built_anew_with_one_warning(
    tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    cached(tmp_path, "birds-0", build)
    damage(the_file(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert same(cached(tmp_path, "birds-0", build), DATA)
        assert same(cached(tmp_path, "birds-0", build), DATA)
    assert build.calls == 2
    assert [record.message for record in caplog.records] == [f"{the_file(tmp_path)} is damaged: rebuilding it"]


def test_a_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> DataSet:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(tmp_path / "data", "birds-0", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_users_cache_serves_where_the_data_root_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    roots = tmp_path / "one", tmp_path / "other"
    build = Builder()
    for root in roots:
        root.mkdir()
        (root / ".cl_runner").write_text("a file where the folder would be")
        assert same(cached(root, "birds-0", build), DATA)
        assert same(cached(root, "birds-0", build), DATA)
    assert build.calls == 2, "two data roots are two data sets"
    assert len(list((tmp_path / "home" / "cl_runner").glob("*/birds-0.safetensors"))) == 2


def test_those_who_may_read_the_folder_may_read_the_file(tmp_path: Path) -> None:
    cached(tmp_path, "birds-0", Builder())
    folder = tmp_path / ".cl_runner"
    assert the_file(tmp_path).stat().st_mode & 0o444 == folder.stat().st_mode & 0o444


def read_slowly(root: Path) -> bool:
    """In another process: build, leave a mark, and take long enough for the other one to arrive."""

    def build() -> DataSet:
        (root / f"built-by-{os.getpid()}").touch()
        time.sleep(0.3)
        return DATA

    (root / f"ready-{os.getpid()}").touch()
    while len(list(root.glob("ready-*"))) < 2:
        time.sleep(0.01)
    return same(cached(root, "birds-0", build), DATA)


def test_of_two_processes_one_builds_and_both_read(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert all(pool.map(read_slowly, [tmp_path, tmp_path]))
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def test_who_waits_for_a_build_that_fails_builds_it_instead(tmp_path: Path) -> None:
    building = threading.Event()

    def fail() -> DataSet:
        building.set()
        time.sleep(0.3)
        raise RuntimeError("no")

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(cached, tmp_path / "data", "birds-0", fail)
        building.wait()
        waiting = pool.submit(cached, tmp_path / "data", "birds-0", Builder())
        assert same(waiting.result(), DATA)
        assert isinstance(failing.exception(), RuntimeError)


def test_a_folder_that_changes_is_decoded_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "birds", ["a", "b"], train=4)
    assert len(ImageFolder(tmp_path / "birds").read().train_images) == 8
    write_folder(tmp_path / "birds", ["a", "b"], train=5)
    assert len(ImageFolder(tmp_path / "birds").read().train_images) == 10
