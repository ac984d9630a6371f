from pathlib import Path

from cl_runner.trackers.sending import folders, mark_sent, unsent


def begun(run: Path, name: str, content: bytes = b"a header and a row") -> Path:
    """A folder like the one wandb makes when a process starts."""
    folder = run.resolve() / "wandb" / name
    folder.mkdir(parents=True)
    (folder / f"run-{name.rpartition('-')[2]}.wandb").write_bytes(content)
    return folder


def test_folders_come_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    late = begun(tmp_path, "offline-run-20261124_031500-abc")
    early = begun(tmp_path, "run-20261124_031400-abc")
    (tmp_path / "wandb" / "latest-run").symlink_to(late)
    assert folders(tmp_path) == [early, late]


def test_folders_of_another_run_are_not_this_runs(tmp_path: Path) -> None:
    begun(tmp_path, "run-20261124_031400-xyz")
    own = begun(tmp_path, "run-20261124_031500-abc")
    assert folders(tmp_path, "abc") == [own]


def test_a_log_of_which_a_kill_left_nothing_is_none(tmp_path: Path) -> None:
    begun(tmp_path, "run-20261124_031400-abc", content=b"header!")
    assert folders(tmp_path) == []


def test_what_came_after_a_missing_part_is_sent_again(tmp_path: Path) -> None:
    names = [f"run-20261124_03140{second}-abc" for second in range(3)]
    first, second, third = (begun(tmp_path, name) for name in names)
    mark_sent([first, third])
    assert unsent(tmp_path) == [second, third]


def test_a_run_that_was_sent_whole_has_nothing_to_send(tmp_path: Path) -> None:
    mark_sent([begun(tmp_path, "run-20261124_031400-abc")])
    assert unsent(tmp_path) == []
