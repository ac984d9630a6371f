"""`cl-runner report` from the command line."""

import csv
import subprocess
import sys

import pytest

from cl_runner.errors import ConfigError
from cl_runner.report.command import main
from tests.report.samples import STAIRS, config, unfinished, write


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1, 2):
        for strength in (1.0, 100.0):
            accuracy = 0.5 + 0.1 * seed + strength / 1000
            write(tmp_path, config("EWC", seed, strength=strength), accuracy, metrics={"validation_accuracy": accuracy})
        write(tmp_path, config("Finetune", seed), 0.4, metrics={"validation_accuracy": 0.4})
    return tmp_path


def test_it_writes_every_file_and_prints_its_table(folder, capsys):
    assert main([str(folder), "--baseline", "finetune", "--curve", "strength"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("| strategy | strength | average_accuracy (%) | Δ to finetune |")
    assert "| finetune | – | 40.0 ± 0.0 |" in said.out
    assert "9 of 9 runs in 3 groups" in said.err
    files = {path.name for path in (folder / "report").iterdir()}
    assert files == {
        *("index.html", "table.csv", "table.md", "table.tex", "runs.csv"),
        *("matrices.png", "accuracy.png", "forgetting.png", "curve-strategy-strength.png"),
    }


def test_what_is_not_in_the_table_is_counted_and_named_everywhere(folder, capsys):
    unfinished(folder, "lwf-s0-1", state="failed", error="ValueError: no")
    assert main([str(folder)]) == 0
    said = capsys.readouterr()
    for text in (said.err, (folder / "report" / "table.md").read_text()):
        assert "run is not in the table: 1 failed" in text
        assert "lwf-s0-1" in text
        assert "ValueError: no" in text
    assert "lwf-s0-1" not in said.out  # what is printed is the table alone, for a pipe


def test_the_choice_is_printed_with_its_test_numbers(folder, capsys):
    assert main([str(folder), "--select", "--spread", "std"]) == 0
    *_, heads, _, ewc, finetune = capsys.readouterr().out.splitlines()
    assert heads.startswith("| strategy | strength | validation_accuracy (%) | chosen from | average_accuracy (%) |")
    assert ewc.startswith("| ewc | 100 | 70.0 ± 10.0 | 2 | 70.0 ± 10.0 |")
    assert finetune.startswith("| finetune | – | 40.0 ± 0.0 | 1 |")
    assert "\n\nMean ± standard deviation over seeds of n runs" in (folder / "report" / "selection.md").read_text()


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_the_command_that_runs_the_choice_over_more_seeds_is_printed(plus, tmp_path, capsys):
    words = f"strategy=ewc 'stream.class_order=[1, 0]' {plus}stream.validation=0.1 {plus}seed=0 {plus}output_root=grid"
    command = f"cl-runner --config-dir own {words}"
    grid = tmp_path / "grid"
    write(grid, config("EWC"), validation=STAIRS)  # a run that says nothing of its command
    write(grid, config("EWC", 1), validation=STAIRS, status={"command": command})
    main([str(grid), "--select"])
    again = (
        "cl-runner -m --config-dir own strategy=ewc 'stream.class_order=[1, 0]' 'seed=range(0,5)' stream.validation=0"
    )
    assert f"over more seeds: {again} output_root={grid}-chosen\n" in capsys.readouterr().err


def test_every_run_has_a_row_of_its_own_with_all_its_metrics(folder):
    main([str(folder)])
    rows = list(csv.DictReader((folder / "report" / "runs.csv").open()))
    assert len(rows) == 9
    assert {(row["strategy"], row["strategy.strength"], row["seed"]) for row in rows} >= {("ewc", "100", "2")}
    (row,) = [row for row in rows if (row["strategy.strength"], row["seed"]) == ("100", "2")]
    assert float(row["average_accuracy"]) == pytest.approx(0.8)
    assert (folder / row["folder"] / "results.json").exists()
    assert row["drift_kl"] == ""


def test_what_an_earlier_report_chose_and_drew_does_not_stay_beside_another(folder):
    main([str(folder), "--pictures", "pdf"])
    main([str(folder), "--select", "--curve", "strength"])
    mine = folder / "report" / "curve-mine.png"
    mine.write_bytes(b"my own")
    main([str(folder)])
    files = {path.name for path in (folder / "report").iterdir()}
    assert not files & {"selection.md", "curve-strategy-strength.png"}
    assert {"curve-mine.png", "forgetting.png", "forgetting.pdf", "table.csv"} <= files


@pytest.mark.parametrize(("kind", "head"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_pictures_are_of_the_kind_asked_for_the_same_bytes_for_the_same_runs(folder, kind, head):
    main([str(folder), "--pictures", kind])
    drawn = {path.name: path.read_bytes() for path in (folder / "report").glob(f"*.{kind}")}
    assert drawn.keys() == {f"matrices.{kind}", f"accuracy.{kind}", f"forgetting.{kind}"}
    assert all(content.startswith(head) for content in drawn.values())
    main([str(folder), "--pictures", kind])
    assert drawn == {path.name: path.read_bytes() for path in (folder / "report").glob(f"*.{kind}")}


def test_runs_on_other_images_or_with_other_code_are_averaged_with_a_warning(folder, capsys):
    main([str(folder)])
    assert "different images" not in capsys.readouterr().err
    for seed, images in enumerate(("aa", "bb")):
        write(folder, config("L2", seed), status={"images": images, "code": {}})
    main([str(folder)])
    says = "the runs of 1 of 4 rows, l2 among them, were made on different images, or with different code"
    assert says in capsys.readouterr().err


def test_a_run_whose_status_was_deleted_is_not_taken_for_one_on_other_images(folder, capsys):
    for seed in (0, 1):
        path = write(folder, config("L2", seed), status={"images": "aa", "code": {}})
    (path / "status.json").unlink()
    main([str(folder)])
    assert "different images" not in capsys.readouterr().err
    (path / "status.json").write_text('{"groups": []}')  # as a later command for another group leaves it
    main([str(folder)])
    assert "different images" not in capsys.readouterr().err


def test_the_same_command_again_makes_the_same_files(folder):
    main([str(folder)])
    before = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    main([str(folder)])
    assert before == {path.name: path.read_bytes() for path in (folder / "report").iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "DIR: expected a folder of runs"),
        ([], "report: the following arguments are required: DIR"),
        (["--by", "strategy", "{}"], "arguments are required: DIR; usage: cl-runner report DIR [options]"),
        (["{}", "--spread", "median"], "invalid choice: 'median'"),
        (["{}", "--tasks", "0", "--select"], "expected a number of tasks, got '0'"),
        (["{}", "--tasks", "2"], "--tasks: expected together with --select"),
        (["{}", "--metrics", "acc"], "--metrics: expected metrics of the runs, got 'acc'"),
        (["{}", "--curve", "strenght"], "--curve: expected a key in which rows differ, got 'strenght'; did you mean"),
        (["{}", "--curve", "lr"], "--curve: expected a key in which rows differ, got 'lr'; all that have it agree"),
        (["{}", "--baseline", "joint"], "--baseline: expected one of the groups, got 'joint'"),
        (["{}", "--baseline", "strategy=finetune,seed=0"], "got 'seed', the seed over which each is a mean"),
        (["{}", "--by", "seed"], "got 'seed', the seed over which each is a mean"),
        (["{}", "--by", "stream.seed"], "got 'stream.seed', the seed over which each is a mean"),
        (["{}", "--basline", "ewc"], "report: unrecognized arguments: --basline ewc; did you mean --baseline?"),
        (["{}", "--by", "model.depth"], "--by: expected a key of the configuration"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(folder, words, said):
    with pytest.raises(ConfigError) as error:
        main([word.format(folder) for word in words])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "report").exists()


def test_torch_is_never_imported():
    code = "import sys; from cl_runner.report import command, page, pictures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
