import json
import time
from io import StringIO

import pytest
from rich.console import Console

from cl_runner.errors import ConfigError
from cl_runner.report.status import Board, Row, _shown, _table, _watch, main
from cl_runner.sweep import Job, Sweep


@pytest.fixture
def run(tmp_path):
    """Make a run's folder: its name, its status, the metrics of its journal's last task row and of its results."""

    def make(name, journal=None, results=None, **status):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps(status))
        if journal is not None:
            rows = [
                {"kind": "step", "seq": 0},
                {"kind": "task", "seq": 1, "metrics": journal},
                {"kind": "step", "seq": 2},
            ]
            (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "ta')
        if results is not None:
            (folder / "results.json").write_text(json.dumps({"metrics": results}))
        return folder

    return make


@pytest.fixture
def said(tmp_path, capsys):
    """Call the command on all runs: (exit status, the lines that it printed)."""

    def call():
        status = main([str(tmp_path)])
        return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return call


def test_a_line_a_run_says_how_far_it_has_come_and_how_well(run, said):
    run("a", state="done", tasks=5, num_tasks=5, step=1200, results={"average_accuracy": 0.931})
    run("deeper/b", state="pending", tasks=2, num_tasks=5, journal={"average_accuracy": 0.5}, stopped="SIGTERM")
    status, lines = said()
    assert status == 0
    assert "a done 5/5 1,200 93.1 %" in lines
    assert "deeper/b pending 2/5 50.0 % stopped by SIGTERM" in lines
    assert lines[-1] == "2 runs: 1 done, 1 pending"


def test_the_accuracy_of_the_last_task_is_found_however_long_the_next_one_takes(run, said):
    journal = run("a", state="pending", tasks=1, num_tasks=2, journal={"average_accuracy": 0.5}) / "steps.jsonl"
    steps = "".join(json.dumps({"kind": "step", "seq": seq, "loss": 0.1}) + "\n" for seq in range(3, 9000))
    journal.write_text(journal.read_text().rpartition("\n")[0] + "\n" + steps)
    assert "a pending 1/2 50.0 %" in said()[1]


def test_a_failed_run_gives_its_reason_in_a_line_and_the_exit_status(run, said):
    run("a", state="failed", error="RuntimeError: it broke\nin two lines", traceback="...")
    status, lines = said()
    assert status == 1
    assert "a failed RuntimeError: it broke" in lines


def test_a_run_that_nobody_is_running_was_killed(run, said):
    run("a", state="running", pid=2**22 + 1, host="here", heartbeat=time.time() - 200)
    status, lines = said()
    assert status == 1
    assert "a killed 3 min ago its process died without a word" in lines


def test_jobs_of_a_sweep_that_have_no_folder_yet_are_shown(run, said, tmp_path):
    run("sweep/a", state="done", results={"average_accuracy": 1.0})
    jobs = [Job(["x=1", f"seed={seed}"], name, "0") for seed, name in enumerate("abc")]
    jobs[2].state, jobs[2].error = "failed", "conf: changed"
    Sweep(tmp_path / "sweep", "cl-runner -m", jobs).write()
    status, lines = said()
    assert status == 1
    assert [line for line in lines if line.startswith("sweep/")] == [
        "sweep/a seed=0 done 100.0 %",
        "sweep/b seed=1 pending",
        "sweep/c seed=2 failed conf: changed",
    ]


def test_runs_of_several_commands_differ_by_what_not_all_of_them_share(run, said, tmp_path):
    for name in "abcd":
        run(name, state="failed", command="cl-runner x=1 y=3" if name == "d" else "cl-runner -m x=1 y=1,2")
    first = [Job(["x=1", "y=1"], "a", "0"), Job(["x=1", "y=2"], "b", "0")]
    Sweep(tmp_path, "cl-runner -m x=1 y=1,2", first).write()
    Sweep(tmp_path, "cl-runner -m x=1 z=1,2", [Job(["x=1", "z=1"], "a", "0"), Job(["x=1", "z=2"], "c", "0")]).write()
    found = [line.removesuffix(" failed") for line in said()[1] if line.endswith(" failed")]
    assert found[:4] == ["a y=1", "b y=2", "c z=2", "d y=3"]


def test_a_run_that_is_linked_to_counts_once_as_the_job_that_it_is(run, said, tmp_path):
    run("b", state="failed")
    for link in ("best", "c"):
        (tmp_path / link).symlink_to(run("sweep/a", state="failed") if link == "best" else tmp_path / "sweep" / "a")
    Sweep(tmp_path / "sweep", "cl-runner -m", [Job(["x=1"], "a", "0"), Job(["x=2"], "d", "0")]).write()
    assert [line for line in said()[1] if "x=" in line] == ["sweep/a x=1 failed", "sweep/d x=2 pending"]
    assert said()[1][-1] == "3 runs: 1 pending, 2 failed"


def test_a_watched_board_ends_where_all_that_is_left_never_came_as_far_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it looks again"))
    Sweep(tmp_path, "cl-runner -m", [Job(["seed=0"], "a", "0", error="conf: changed")]).write()
    assert [row.state for row in _watch(Board(tmp_path))] == ["failed"]


def test_the_exit_status_is_that_of_the_table(said, monkeypatch):
    looks = iter([[Row("a", "failed")], [Row("a", "done")]])
    monkeypatch.setattr(Board, "rows", lambda _: next(looks))
    status, lines = said()
    assert (status, lines[-1]) == (1, "1 run: 1 failed")


def test_a_job_whose_folder_is_gone_is_no_longer_done(run, said, tmp_path):
    run("a", state="done", results={"average_accuracy": 1.0})
    jobs = [Job([f"seed={seed}"], name, "0", state="done") for seed, name in enumerate("ab")]
    Sweep(tmp_path, "cl-runner -m", jobs).write()
    assert said()[1][-1] == "2 runs: 1 done, 1 pending"


@pytest.mark.parametrize("name", ["status.json", "results.json"])
def test_a_run_with_a_damaged_file_hides_no_other(run, said, name):
    run("a", state="done", results={"average_accuracy": 1.0})
    (run("b", state="done", results={}) / name).write_text("")
    status, lines = said()
    assert status == 1
    assert any(line.startswith(f"b failed {name}: expected JSON") for line in lines)
    assert lines[-1] == "2 runs: 1 done, 1 failed"


def test_a_run_is_told_by_the_keys_of_the_sweep_that_made_it(run, said, tmp_path):
    run("sweep/a", state="done", results={"average_accuracy": 1.0})
    first = Sweep(tmp_path / "sweep", "cl-runner -m first", [Job(["lr=1"], "a", "0"), Job(["lr=2"], "b", "1")])
    first.write()
    Sweep(tmp_path / "sweep", "cl-runner -m later", [Job(["lr=1", "x=3"], "a", "0"), Job(["x=4"], "c", "2")]).write()
    first.close()
    assert [line for line in said()[1] if line.startswith("sweep/")] == [
        "sweep/a lr=1 done 100.0 %",
        "sweep/b lr=2 pending",
        "sweep/c x=4 pending",
    ]


def test_the_jobs_of_a_sweep_stand_in_its_order_and_before_what_is_in_none(run, said, tmp_path):
    for name in "abcd":
        run(name, state="done", results={"average_accuracy": 1.0})
    Sweep(tmp_path, "cl-runner -m", [Job([f"lr={lr}"], name, "0") for lr, name in enumerate("cad", start=1)]).write()
    rows = [line for line in said()[1] if line.endswith("100.0 %")]
    assert rows == ["c lr=1 done 100.0 %", "a lr=2 done 100.0 %", "d lr=3 done 100.0 %", "b done 100.0 %"]


def test_where_there_are_no_runs_yet_a_watched_board_says_so():
    file = StringIO()
    Console(file=file).print(_shown([], 80))
    assert file.getvalue() == "no runs\n"


def test_columns_that_say_nothing_are_left_out(run, said):
    run("a", state="done", tasks=5, num_tasks=5, results={"average_accuracy": 1.0})
    assert "run state task accuracy" in said()[1]


@pytest.mark.parametrize(("width", "whole"), [(100, True), (50, False)])
def test_a_name_stands_whole_where_there_is_room_for_it(width, whole):
    name = "finetune-split_digits-mlp-s0-f1d5994e"
    file = StringIO()
    console = Console(width=width, file=file)
    console.print(_table([Row(name, "done", accuracy=1.0, differs="strategy.strength=1000000.0")], width))
    said = file.getvalue()
    assert (name in said) is whole
    assert "100.0 %" in said


def test_runs_of_no_sweep_are_told_by_what_their_commands_do_not_share(run, said):
    command = "cl-runner strategy=combined seed=1 output_root=outputs"
    run("a", state="done", results={}, command=command)
    other = f"{command} '~strategy@strategy.parts.ewc' rerun=true tracker.notes=x hydra/launcher=local 'plugins=[p]'"
    run("b", state="done", results={}, command=other)
    run("deeper/c", state="done", results={}, command="cl-runner strategy=er")
    assert [line for line in said()[1] if "done" in line.split()] == [
        "a done",
        "b '~strategy@strategy.parts.ewc' 'plugins=[p]' done",
        "deeper/c done",
        "3 runs: 3 done",
    ]


def test_a_run_that_was_moved_aside_is_not_counted(run, said):
    run("a", state="done", results={})
    run("a.1", state="failed", error="long ago")
    status, lines = said()
    assert status == 0
    assert lines[-1] == "1 run: 1 done"


def test_what_lies_in_a_runs_folder_is_no_run(run, said):
    run("a", state="done", results={})
    run("a/inner", state="failed", error="no")
    assert said()[0] == 0


def test_no_runs_are_no_failure(said):
    assert said() == (0, ["no runs"])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="status: expected a folder"):
        main([str(tmp_path / "nothing")])
