import json
import math
import re
from dataclasses import replace

import pytest

from cl_runner import verify
from cl_runner.compose import compose_jobs
from cl_runner.config import check, validated
from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.published import Measured, Row, chosen, published
from cl_runner.verify import main

ROWS = published()
SMALL = ["stream=split_digits", "stream.max_per_class=5", "model=mlp", "model.widths=[4]", "trainer.epochs=1"]
FILE = """
published:
  source: a paper
  n: 4
  seeds: 2
  rows:
    one: {overrides: [strategy=finetune], value: 50.0, sem: 1.0}
    other: {overrides: [strategy=joint], value: 60.0, tolerance: 3.0, tier: gpu, seeds: 3}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "study.yaml").write_text(FILE)
    (tmp_path / "silent.yaml").write_text("seed: 1\n")
    return tmp_path


def test_a_row_takes_from_its_study_what_it_does_not_set_itself(folder):
    one, other = published(folder)
    assert (one.name, one.tier, one.seeds, one.sd) == ("study/one", "cpu", range(1, 3), 2.0)
    assert (other.name, other.tier, other.seeds, other.tolerance) == ("study/other", "gpu", range(1, 4), 3.0)


def test_a_mean_passes_within_two_standard_errors_of_the_difference(folder):
    one, _ = published(folder)
    allowed = 2 * math.sqrt(1.0 + 4.0 / 2)  # SEM 1, SD 2, two runs of ours
    assert one.allowed(2) == pytest.approx(allowed)
    assert Measured(one, (50 + allowed - 0.01,) * 2).verdict == "pass"
    assert Measured(one, (50 - allowed - 0.01,) * 2).verdict == "miss"


def test_a_studys_tolerance_is_for_rows_without_an_error_or_one_of_their_own(tmp_path):
    rows = {"own": "tolerance: 1.0", "error": "sem: 0.5", "neither": "n: 9"}
    lines = [f"    {name}: {{overrides: [], value: 50.0, {says}}}" for name, says in rows.items()]
    head = "published:\n  source: x\n  n: 4\n  seeds: 2\n  tolerance: 3.0\n  rows:\n"
    (tmp_path / "study.yaml").write_text(head + "\n".join(lines))
    assert {row.name: row.tolerance for row in published(tmp_path)} == {
        "study/own": 1.0,
        "study/error": None,
        "study/neither": 3.0,
    }


def test_no_tolerance_is_narrower_than_half_a_point(folder):
    (folder / "study.yaml").write_text(FILE.replace("sem: 1.0", "sem: 0.01"))
    assert published(folder)[0].allowed(10) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "value: 50.0, sem: 1.0, tolerance: 1.0",
            "study.yaml: published.rows.one: expected one of sem, sd and tolerance",
        ),
        ("value: 50.0, sem: 1.0, sd: 2.0", "study.yaml: published.rows.one: expected one of sem, sd and tolerance"),
        ("value: 50.0", "study.yaml: published.rows.one: expected one of sem, sd and tolerance"),
        ("valu: 50.0, sem: 1.0", r"study.yaml: published.rows.one.value: Field required"),
    ],
)
def test_a_row_that_is_said_wrongly_is_named(wrong, message, folder):
    (folder / "study.yaml").write_text(FILE.replace("value: 50.0, sem: 1.0", wrong))
    with pytest.raises(ConfigError, match=message):
        published(folder)


def test_rows_are_chosen_by_name_by_experiment_or_by_tier(folder):
    one, other = rows = published(folder)
    assert chosen(rows, ["study/other"], None) == [other]
    assert chosen(rows, ["study"], None) == rows
    assert chosen(rows, [], None) == [one]
    assert chosen(rows, [], "gpu") == rows
    with pytest.raises(ConfigError, match=r"expected a row or an experiment, got 'studdy'; did you mean study"):
        chosen(rows, ["studdy"], None)
    with pytest.raises(ConfigError, match=r"got 'othr'; did you mean study/other\?"):
        chosen(rows, ["othr"], None)
    with pytest.raises(ConfigError, match=r"got 'other'; did you mean study/other\?"):
        chosen(rows, ["other"], None)
    with pytest.raises(ConfigError, match="got 'zzz'; cl-runner verify --list names all"):
        chosen(rows, ["zzz"], None)


def test_seeds_are_the_rows_own(folder, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    with pytest.raises(ConfigError, match="seed: expected none: every row runs over seeds of its own"):
        main(["study/one", "seed=0"])
    with pytest.raises(ConfigError, match="seed: expected none"):
        main(["study/one", "++seed=0"])


@pytest.mark.parametrize("name", ["notes.md", "nowhere/PUBLISHED.md"])
def test_nothing_that_is_no_table_is_written_over(folder, name, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match="--write: expected a"):
        main(["study/one", "--only-done", "--write", str(tmp_path / name)])
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_no_row_is_run_where_one_cannot_be(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    other = FILE.replace("[strategy=joint]", "[strategy=joint, strategy.strength=1]")
    (folder / "study.yaml").write_text(other)
    with pytest.raises(ConfigError, match=r"strategy\.strength: unknown key"):
        main(["study", f"output_root={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


def test_nothing_is_run_again_where_nothing_is_to_be_run(folder, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    with pytest.raises(ConfigError, match="^rerun: expected false beside --only-done"):
        main(["study/one", "--only-done", "rerun=true"])


def test_only_rows_that_are_named_are_listed(folder, monkeypatch, capsys):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["row", "study/one", "study/other"]
    assert main(["--list", "study/other"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["row", "study/other"]


def test_a_row_that_holds_no_longer_goes_even_where_nothing_is_measured(folder, tmp_path, monkeypatch):
    one, other = published(folder)
    table = tmp_path / "PUBLISHED.md"
    verify.write(table, [Measured(one, (50.0, 50.0)), Measured(replace(other, value=61.0), (60.0,) * 3)], [one, other])
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    main(["study/other", "--only-done", f"output_root={tmp_path}", "--write", str(table)])
    assert "| study/one |" in table.read_text()
    assert "| study/other |" not in table.read_text()


def test_a_tier_beside_names_is_refused(folder, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    with pytest.raises(ConfigError, match="^--tier: expected it, or rows by name, got both: 'study/one'"):
        main(["study/one", "--tier", "cpu"])


def test_only_done_says_how_much_is_not(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    assert main(["study/one", "--only-done", f"output_root={tmp_path}"]) == 0
    assert capsys.readouterr().out == "not done: 1 of 1 row; without --only-done they are run\n"


@pytest.mark.parametrize("row", {tuple(row.command(seed=1)): row for row in ROWS}.values(), ids=lambda row: row.name)
def test_every_published_row_composes_to_a_configuration(row):
    (cfg,) = compose_jobs(row.command(seed=1))
    validated(cfg)


def test_what_is_published_changes_no_run(tmp_path):
    (cfg,) = compose_jobs(["stream=split_digits", "model=mlp", "strategy=finetune", "tracker=local", "device=cpu"])
    before = check(cfg).hash
    cfg.published = {"source": "a paper"}
    experiment = check(cfg)
    assert experiment.hash == before
    assert "published" not in experiment.config


def test_a_row_is_run_once_and_its_verdict_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    words = ["study/one", "device=cpu", f"output_root={tmp_path / 'runs'}"]
    table = tmp_path / "PUBLISHED.md"
    main([*words, "--write", str(table)])
    assert "not the published protocol" not in capsys.readouterr().out
    runs = sorted((tmp_path / "runs").glob("*/results.json"))
    times = [run.stat().st_mtime_ns for run in runs]
    main([words[0], "--only-done", *words[1:], "trainer.log_every=7"])
    assert "not the published protocol" not in capsys.readouterr().out
    assert [run.stat().st_mtime_ns for run in runs] == times
    assert len(times) == 2
    accuracies = [100 * json.loads(run.read_text())["metrics"]["average_accuracy"] for run in runs]
    (line,) = [line for line in table.read_text().splitlines() if line.startswith("| study/one")]
    assert f"| {sum(accuracies) / 2:.2f} ± " in line
    *_, tolerance, verdict, _ = (cell.strip() for cell in line.split("|"))
    assert verdict == ("pass" if abs(sum(accuracies) / 2 - 50.0) <= float(tolerance) else "miss")
    assert "a paper" in table.read_text()
    first = RunFolder(runs[0].parent)
    first.update_status(code={**first.status["code"], "cl_runner.strategies.finetune": "0badc0de"})
    main([words[0], "--only-done", *words[1:]])
    assert re.search(r"1 run was made with other code than .* now: study/one seed=\d", capsys.readouterr().out)
    main([*words, "rerun=true"])
    said = capsys.readouterr().out
    assert "study/one" in said
    assert "other code" not in said
    assert [run.stat().st_mtime_ns for run in runs] != times


def test_a_row_is_in_the_table_before_the_next_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])

    def stopped_at_the_second(row, *_):
        if row.name == "study/other":
            raise KeyboardInterrupt
        return [50.0, 51.0]

    monkeypatch.setattr(verify, "_values", stopped_at_the_second)
    table = tmp_path / "PUBLISHED.md"
    with pytest.raises(KeyboardInterrupt):
        main(["study", "--write", str(table)])
    assert "| study/one | 50.00 ± 1.00 | 4 | 50.50 ± 0.50 | 2 |" in table.read_text()


def test_another_protocol_is_said_and_never_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    words = ["study/one", "trainer.batch_size=4", f"output_root={tmp_path / 'runs'}"]
    with pytest.raises(ConfigError, match=r"--write: expected no change .* got trainer.batch_size=4$"):
        main([*words, "--write", str(tmp_path / "PUBLISHED.md")])
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--only-done"]) == 0
    assert "not the published protocol: trainer.batch_size=4" in capsys.readouterr().out


def test_another_protocol_is_given_no_verdict(folder, monkeypatch, capsys):
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*SMALL, *row.overrides, f"seed={seed}"])
    for accuracy, status in ((50.0, 0), (90.0, 1)):
        monkeypatch.setattr(verify, "_values", lambda row, *_, value=accuracy: iter([value] * len(row.seeds)))
        assert main(["study/one"]) == status
        assert main(["study/one", "trainer.batch_size=4"]) == 0
        _, as_published, _, _, otherwise = (line.split() for line in capsys.readouterr().out.splitlines())
        assert as_published[-1] == ("miss" if status else "pass")
        assert " ".join(otherwise).endswith("none: another protocol")


def test_weights_that_are_the_users_to_bring_change_no_protocol(tmp_path, capsys):
    brought = ["model.pretrained=conv5.pt", "--only-done", f"output_root={tmp_path}"]
    assert main(["vandeven_split_cifar100/none", *brought]) == 0
    assert "not the published protocol" not in capsys.readouterr().out
    assert main(["vandeven_split_mnist_class/none", *brought]) == 0
    assert "not the published protocol: model.pretrained=conv5.pt" in capsys.readouterr().out


def test_no_row_runs_without_the_weights_that_are_the_users_to_bring(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["vandeven_split_cifar100/none", "device=cpu"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    why = "model.pretrained: expected a file of weights, got 'conv5-cifar10.pt', which is not there"
    assert line == f"vandeven_split_cifar100/none: {why}"


def test_rows_that_a_table_holds_stay_while_what_was_published_does(folder, tmp_path):
    table, (one, other) = tmp_path / "PUBLISHED.md", published(folder)

    def rows():
        return [line.split(" | ")[0] for line in table.read_text().splitlines() if line.startswith("| study")]

    verify.write(table, [Measured(other, (90.0, 90.5, 91.0))], [one, other])
    assert rows() == ["| study/other"]
    assert "cl-runner verify study/other --write" in table.read_text()
    verify.write(table, [Measured(one, (50.0, 50.0))], [one, other])
    assert rows() == ["| study/one", "| study/other"]
    assert "90.50 ± 0.29 | 3 | +30.50 | 3.00 | miss |" in table.read_text()
    assert "cl-runner verify study --write" in table.read_text()
    before = table.read_text()
    for moved in (replace(other, value=61.0), replace(other, tolerance=31.0), replace(other, seeds=range(1, 5))):
        table.write_text(before)
        verify.write(table, [Measured(one, (51.0, 51.0))], [one, moved])
        assert rows() == ["| study/one"]
        assert "51.00" in table.read_text()


def test_a_row_that_cannot_be_run_is_named_and_stops_no_other(folder, tmp_path, monkeypatch, capsys):
    (folder / "study.yaml").write_text(FILE.replace("[strategy=finetune]", "[model.pretrained=nowhere.safetensors]"))
    monkeypatch.setattr(verify, "published", lambda: published(folder))
    monkeypatch.setattr(Row, "command", lambda row, seed: [*row.overrides, f"seed={seed}"])
    assert main(["study", *SMALL, "device=cpu", f"output_root={tmp_path / 'runs'}"]) == 1
    said = capsys.readouterr().out
    assert said.count("study/one: model.pretrained: expected a file") == 1
    assert "study/other" in said
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 3
