from pathlib import Path

import pytest

from cl_runner.trackers.base import Many, NullTracker
from tests.trackers.samples import journal_rows, results, run_info, tell


class Diary(NullTracker):
    """Records what it is told."""

    def __init__(self, told: list[str], name: str, breaks: bool = False) -> None:
        self.told, self.name, self.breaks = told, name, breaks

    def step(self, row: dict) -> None:
        self.told.append(f"{self.name} step {row['seq']}")

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        self.told.append(f"{self.name} close {failed} {preempted}")
        if self.breaks:
            raise OSError("disk full")


def test_many_trackers_are_told_in_turn() -> None:
    told: list[str] = []
    Many([Diary(told, "a"), Diary(told, "b")]).step({"seq": 7})
    assert told == ["a step 7", "b step 7"]


def test_a_tracker_that_cannot_close_does_not_keep_the_others_open() -> None:
    told: list[str] = []
    with pytest.raises(OSError, match="disk full"):
        Many([Diary(told, "a", breaks=True), Diary(told, "b")]).close(failed=True)
    assert told == ["a close True False", "b close True False"]


def test_many_trackers_hear_that_the_run_was_preempted() -> None:
    told: list[str] = []
    Many([Diary(told, "a"), Diary(told, "b")]).close(preempted=True)
    assert told == ["a close False True", "b close False True"]


def test_the_null_tracker_leaves_no_trace(tmp_path: Path) -> None:
    tracker = NullTracker()
    tracker.start(run_info(tmp_path))
    tell(tracker, journal_rows())
    tracker.finish(results())
    tracker.close()
    assert list(tmp_path.iterdir()) == []
