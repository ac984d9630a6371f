"""The commit that a run's numbers were made at."""

import shutil
import subprocess

import pytest

from cl_runner.environment import _commit, differences

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "cl_runner").mkdir()
    (tmp_path / "cl_runner" / "method.py").write_text("STRENGTH = 1\n")
    (tmp_path / "notes.txt").write_text("none\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Begin")
    return tmp_path, git(tmp_path, "rev-parse", "HEAD").strip()


def commit(folder):
    _commit.cache_clear()
    return _commit(folder)


def test_a_clone_has_its_commit_and_uncommitted_changes_of_the_code_are_told_apart(clone):
    folder, head = clone
    assert commit(folder) == head
    (folder / "notes.txt").write_text("some\n")
    assert commit(folder) == head
    found = []
    for strength in (2, 3):
        (folder / "cl_runner" / "method.py").write_text(f"STRENGTH = {strength}\n")
        found.append(commit(folder))
    (folder / "cl_runner" / "new.py").write_text("untracked\n")
    found.append(commit(folder))
    (folder / "cl_runner" / "method.py").unlink()
    found.append(commit(folder))
    assert all(each.startswith(f"{head}+") for each in found)
    assert len(set(found)) == 4


def test_a_commit_of_other_things_than_code_is_none_of_the_codes(clone):
    folder, head = clone
    (folder / "notes.txt").write_text("some\n")
    git(folder, "commit", "-qam", "Note")
    assert commit(folder) == head


def test_an_installed_package_has_no_commit_even_within_a_clone(clone):
    folder, _ = clone
    (folder / "site-packages").mkdir()
    assert commit(folder / "site-packages") is None


def test_what_several_earlier_environments_have_in_common_is_said_once():
    now = {"cl_runner": "1", "commit": "b", "torch": "2.7"}
    earlier = [now | {"commit": "a", "threads": count} for count in (1, 2)] + [now | {"commit": None}]
    assert differences(earlier, now) == ["commit a (now b)"]
