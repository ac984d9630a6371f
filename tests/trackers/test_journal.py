import csv
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from cl_runner.trackers.journal import Journal, read_journal, to_json
from tests.trackers.samples import journal_rows, results, run_info, tell


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    tracker = Journal()
    tracker.start(run_info(tmp_path))
    tell(tracker, journal_rows())
    tracker.finish(results())
    tracker.close()
    return tmp_path


def test_the_journal_holds_every_row_in_order(finished: Path) -> None:
    assert read_journal(finished) == journal_rows()


def test_a_row_is_on_disk_as_soon_as_it_is_told(tmp_path: Path) -> None:
    tracker = Journal()
    tracker.start(run_info(tmp_path))
    tracker.step(journal_rows()[0])
    assert read_journal(tmp_path) == journal_rows()[:1]
    tracker.close()


def test_the_results_are_read_back_as_they_were(finished: Path) -> None:
    assert json.loads((finished / "results.json").read_text(encoding="utf-8")) == results()


def test_what_is_written_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = to_json({"loss": math.nan, "rows": [[1.0, math.inf], (-math.inf,)]})
    assert json.loads(text, parse_constant=refuse) == {"loss": None, "rows": [[1.0, None], [None]]}


def test_the_table_has_a_line_for_each_measured_entry(finished: Path) -> None:
    with (finished / "accuracy.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    told = {(line["scenario"], int(line["after_task"]), int(line["task"])): float(line["accuracy"]) for line in lines}
    assert len(lines) == 2 * 6
    assert told["class", 2, 0] == 0.52
    assert told["task", 1, 1] == pytest.approx(0.85)
    assert ("class", 0, 1) not in told


def test_the_picture_lies_in_the_folder(finished: Path) -> None:
    with Image.open(finished / "accuracy.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1600, 800))


def test_no_half_written_file_is_left(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"steps.jsonl", "results.json", "accuracy.csv", "accuracy.png"}


@pytest.mark.parametrize("rewound", ["before start", "after start"])
def test_a_resumed_run_takes_up_the_journal_where_its_checkpoint_left_it(tmp_path: Path, rewound: str) -> None:
    rows = journal_rows()
    killed = Journal()
    killed.start(run_info(tmp_path))
    tell(killed, rows[:5])
    offset = killed.offset
    tell(killed, rows[5:8])
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"kind": "st')  # the process died in the middle of a line
    resumed = Journal()
    if rewound == "before start":
        resumed.rewind(offset)
    resumed.start(run_info(tmp_path, resumed=True))
    if rewound == "after start":
        resumed.rewind(offset)
    assert read_journal(tmp_path) == rows[:5]
    assert resumed.offset == offset
    tell(resumed, rows[5:])
    resumed.close()
    assert read_journal(tmp_path) == rows


def test_a_run_that_begins_anew_forgets_the_rows_of_one_that_never_saved(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = Journal()
        tracker.start(run_info(tmp_path))
        tell(tracker, journal_rows()[:3])
        tracker.close()
    assert read_journal(tmp_path) == journal_rows()[:3]


def test_rewinding_never_makes_a_journal_longer(tmp_path: Path) -> None:
    tracker = Journal()
    tracker.start(run_info(tmp_path))
    tell(tracker, journal_rows()[:2])
    tracker.rewind(100_000)
    tell(tracker, journal_rows()[2:3])
    tracker.close()
    assert read_journal(tmp_path) == journal_rows()[:3]


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_bytes(b'{"seq": 0}\n{"seq": 1')
    assert read_journal(tmp_path) == [{"seq": 0}]


def test_closing_a_tracker_that_never_started_is_nothing() -> None:
    tracker = Journal()
    tracker.close(failed=True)
    assert tracker.offset == 0
