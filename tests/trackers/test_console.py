import io
import logging
from pathlib import Path

from rich.console import Console

from cl_runner.logs import log_file, log_to
from cl_runner.trackers.console import TerminalTracker, show_results, show_tables
from tests.trackers.samples import journal_rows, results, run_info, tell


def pipe(width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width), text


def shown(folder: Path, terminal: Console, failed: bool = False, preempted: bool = False) -> None:
    console = TerminalTracker(terminal, lambda: "W&B: offline; send it with: wandb sync somewhere")
    console.start(run_info(folder))
    tell(console, journal_rows())
    if not failed and not preempted:
        console.finish(results())
    console.close(failed, preempted)


def test_each_task_has_a_line_when_it_ends(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines() if line.startswith("task ")]
    # After task 1: (0.61 + 0.8) / 2 = 70.5 %, and 0.9 - 0.61 = 29 % forgotten.
    assert lines[0].startswith("task 0 (1/3) accuracy 90.0 % average 90.0 % forgetting – % seconds")
    assert lines[1].startswith("task 1 (2/3) accuracy 80.0 % average 70.5 % forgetting 29.0 % seconds")
    assert len(lines) == 3


def test_the_log_file_has_the_tasks_too(tmp_path: Path) -> None:
    with log_file(tmp_path):
        shown(tmp_path, pipe()[0])
    lines = [line.partition(": ")[2] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert sum(line.startswith("task ") and "accuracy" in line for line in lines) == 3


def test_the_end_shows_the_own_matrix(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal)
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["0", "90.0"] in lines
    assert ["1", "61.0", "80.0"] in lines
    assert ["2", "52.0", "73.0", "64.0"] in lines


def test_the_end_shows_every_metric_that_is_defined_in_both_scenarios(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "metric class task" in lines
    assert "average_accuracy 63.0 % 68.0 %" in lines
    assert "average_forgetting 22.5 % 22.5 %" in lines
    assert not any(line.startswith("forward_transfer") for line in lines)  # undefined in both scenarios
    assert "drift_kl 0.0321" in lines


def test_the_last_lines_can_be_copied_whatever_the_width(tmp_path: Path) -> None:
    terminal, text = pipe(width=30)
    shown(tmp_path, terminal)
    assert text.getvalue().splitlines()[-2:] == [
        f"folder   {tmp_path}",
        "W&B: offline; send it with: wandb sync somewhere",
    ]


def test_a_run_that_fails_tells_how_to_go_on(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal, failed=True)
    assert "failed; go on with: cl-runner strategy=ewc\n" in text.getvalue()


def test_a_run_that_was_preempted_tells_that_it_is_saved_and_how_to_go_on(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal, preempted=True)
    assert "saved and stopped; go on with: cl-runner strategy=ewc\n" in text.getvalue()


def test_a_pipe_gets_no_bars(tmp_path: Path) -> None:
    terminal, text = pipe()
    shown(tmp_path, terminal)
    assert "\x1b" not in text.getvalue()
    assert "batches" not in text.getvalue()


def test_a_terminal_gets_bars_with_the_loss(tmp_path: Path) -> None:
    text = io.StringIO()
    console = TerminalTracker(Console(file=text, width=100, force_terminal=True))
    console.start(run_info(tmp_path))
    console.step(journal_rows()[1])
    console.close()
    assert "batches" in text.getvalue()
    assert "2/4" in text.getvalue()
    assert "loss 1.5" in text.getvalue()


def test_a_terminal_says_what_goes_on_where_no_batch_is_learned(tmp_path: Path) -> None:
    text = io.StringIO()
    console = TerminalTracker(Console(file=text, width=100, force_terminal=True))
    console.start(run_info(tmp_path))
    row = journal_rows()[1]
    console.step({**row, "task_step": row["task_steps"]})
    console.close()
    last = text.getvalue().rpartition("batches")[2]
    assert "evaluating and consolidating" in last
    assert "loss" not in last


def test_a_matrix_that_does_not_fit_becomes_a_line_a_task() -> None:
    long = results()
    long["accuracy"] = {"class": [[0.25 + (i == j) / 2 for j in range(40)] for i in range(40)]}
    terminal, text = pipe(width=80)
    show_tables(long, "class", terminal)
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["7", "75.0", "25.0"] in lines
    assert all(len(line) <= 80 for line in text.getvalue().splitlines())


def test_a_finished_run_is_shown_from_its_results(tmp_path: Path) -> None:
    terminal, text = pipe()
    show_results(results(), tmp_path, terminal)
    assert "64.0" in text.getvalue()
    assert text.getvalue().endswith(f"folder   {tmp_path}\n")


def test_what_is_logged_shows_on_the_same_terminal_until_it_is_left() -> None:
    terminal, text = pipe()
    logger = logging.getLogger("cl_runner.fisher")
    with log_to(terminal):
        logger.info("the pass will take %d minutes", 7)
        logger.debug("a detail")
    logger.warning("too late")
    assert "INFO" in text.getvalue()
    assert "the pass will take 7 minutes" in text.getvalue()
    assert "a detail" not in text.getvalue()
    assert "too late" not in text.getvalue()


def test_the_log_file_has_details_too_and_is_appended_to(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with log_file(tmp_path):
            logging.getLogger("cl_runner.run").debug("the %s process", word)
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" DEBUG ")[2] for line in lines] == [
        "cl_runner.run: the first process",
        "cl_runner.run: the second process",
    ]


def test_closing_a_console_that_never_started_says_nothing() -> None:
    terminal, text = pipe()
    TerminalTracker(terminal).close(failed=True)
    assert text.getvalue() == ""
