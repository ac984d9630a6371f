"""Which folders are runs, and how unfinished ones are reported."""

import numpy as np
import pytest

from cl_runner.errors import ConfigError
from cl_runner.report.runs import read
from cl_runner.sweep import Job, Sweep
from tests.report.samples import STAIRS, config, unfinished, write


def test_a_finished_run_is_read_with_its_matrix_and_its_metrics(tmp_path):
    path = write(tmp_path, config(seed=3), accuracy=0.7)
    (run,) = read(tmp_path).runs
    assert (run.folder, run.seed, run.num_tasks) == (path.name, 3, 3)
    expected = np.array(STAIRS, dtype=float)
    np.testing.assert_array_equal(run.accuracy, expected)
    assert run.metrics["average_accuracy"] == 0.7
    assert (run.metrics["seconds"], run.metrics["seconds/train"], run.metrics["peak_memory/train"]) == (2.0, 1.5, 3e6)


def test_what_is_not_done_is_named_with_its_state_and_its_reason(tmp_path):
    write(tmp_path, config())
    unfinished(tmp_path, "a-s0-1", state="running", tasks=2, num_tasks=5)
    unfinished(tmp_path, "b-s0-2", state="failed", error="ValueError: the loss is nan\nmore of it")
    unfinished(tmp_path, "c-s0-3", state="pending", stopped="SIGTERM")
    found = {run.folder: (run.state, run.why) for run in read(tmp_path).left_out}
    assert found == {
        "a-s0-1": ("killed", "its process died without a word, 2 of 5 tasks"),  # nobody holds its lock
        "b-s0-2": ("failed", "ValueError: the loss is nan"),
        "c-s0-3": ("pending", "stopped by SIGTERM"),
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1, "conf', "results.json is not JSON"),
        ('{"schema": 7}', "expected schema 1, got 7"),
        ('{"schema": 1, "config": {}}', "expected what a finished run writes"),
        ("[]", "expected an object, got list"),
        (None, "results.json is missing"),
    ],
)
def test_damaged_results_are_named_and_do_not_stop_the_others(tmp_path, content, said):
    write(tmp_path, config(seed=0))
    path = write(tmp_path, config(seed=1)) / "results.json"
    path.write_text(content) if content else path.unlink()
    found = read(tmp_path)
    assert len(found.runs) == 1
    (damaged,) = found.left_out
    assert (damaged.folder, damaged.state) == (path.parent.name, "damaged")
    assert said in damaged.why


def test_runs_in_folders_below_are_read_too_with_their_sweeps(tmp_path):
    top = write(tmp_path, config(seed=0))
    below = write(tmp_path / "pilot" / "second", config(seed=1))
    elsewhere = write(tmp_path / ".elsewhere", config(seed=2))
    (tmp_path / "pilot" / "linked").symlink_to(elsewhere)
    (tmp_path / "pilot" / "round").symlink_to(tmp_path)
    (tmp_path / "pilot" / "there_too").symlink_to(below)
    write(tmp_path / ".hidden", config(seed=3))
    Sweep(tmp_path / "pilot", "cl-runner -m", [Job(["seed=4"], "ewc-s4-abc", "4", error="no such data")]).write()
    found = read(tmp_path)
    assert [run.folder for run in found.runs] == [top.name, "pilot/linked", f"pilot/second/{below.name}"]
    assert [(run.folder, run.why) for run in found.left_out] == [("pilot/ewc-s4-abc", "no such data")]


def test_runs_moved_aside_are_no_runs(tmp_path):
    write(tmp_path, config(), name="finetune-split_digits-mlp-s0-00c0ffee")
    write(tmp_path, config(), name="finetune-split_digits-mlp-s0-00c0ffee.1")
    (tmp_path / "notes").mkdir()
    found = read(tmp_path)
    assert [run.folder for run in found.runs] == ["finetune-split_digits-mlp-s0-00c0ffee"]
    assert not found.left_out


def test_a_job_of_a_sweep_that_left_no_folder_is_named(tmp_path):
    done = write(tmp_path, config())
    jobs = [Job(["seed=0"], done.name, "0"), Job(["seed=1"], "ewc-s1-abc", "1", error="no such data")]
    Sweep(tmp_path, "cl-runner -m", jobs).write()
    (missing,) = read(tmp_path).left_out
    assert (missing.folder, missing.state, missing.why, missing.there) == (
        "ewc-s1-abc",
        "failed",
        "no such data",
        False,
    )


def test_a_folder_without_finished_runs_is_refused_with_what_it_has(tmp_path):
    unfinished(tmp_path / "a", "x", state="failed", error="no")
    for folder, said in [("nowhere", "no folder"), ("a", "1 failed"), ("", "1 failed")]:
        with pytest.raises(ConfigError) as error:
            read(tmp_path / folder)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_the_folder_of_one_run_is_refused_with_the_one_to_take(tmp_path):
    path = write(tmp_path, config())
    with pytest.raises(ConfigError, match="is a run's own"):
        read(path)
