"""Tables: what their cells say, in every format."""

import csv
from io import StringIO

import pytest
from rich.console import Console

from cl_runner.errors import ConfigError
from cl_runner.report.groups import group_runs
from cl_runner.report.runs import read
from cl_runner.report.table import find_baselines, make_table, runs_to_csv, to_csv, to_latex, to_markdown, to_rich
from tests.report.samples import config, write

ALL = ["std", "interval"]


@pytest.fixture
def groups(tmp_path):
    """Finetune 0.4, 0.5, 0.6 on seeds 0 to 2; EWC 0.6, 0.8 on seeds 1 and 2, and 0.9 on seed 3."""
    for seed, accuracy in enumerate((0.4, 0.5, 0.6)):
        write(tmp_path, config("Finetune", seed), accuracy)
    for seed, accuracy in ((1, 0.6), (2, 0.8), (3, 0.9)):
        write(tmp_path, config("EWC", seed), accuracy)
    return group_runs(read(tmp_path).runs)


def test_markdown_has_mean_spread_interval_and_number(groups):
    lines = to_markdown(make_table(groups, ["average_accuracy"]), ALL).splitlines()
    assert lines == [
        "| strategy | average_accuracy (%) | n |",
        "|---|---|---|",
        "| ewc | 76.7 ± 15.3 [38.7, 114.6] | 3 |",
        "| finetune | 50.0 ± 10.0 [25.2, 74.8] | 3 |",
    ]


def test_the_difference_to_a_baseline_is_of_equal_seeds(groups):
    table = make_table(groups, ["average_accuracy"], "finetune")
    ewc, finetune = table.cells(ALL)
    assert ewc[2] == "+15.0 [−48.5, 78.5] (2)"  # +10 and +20: 15 ± 12.706 · 5
    assert finetune[2] == ""
    assert table.heads() == ["strategy", "average_accuracy (%)", "Δ to finetune", "n"]


def test_the_spread_beside_a_mean_is_that_asked_for(groups):
    table = make_table(groups, ["average_accuracy"])
    assert [table.cells(spread)[1][1] for spread in ([], ["std"], ["sem"])] == ["50.0", "50.0 ± 10.0", "50.0 ± 5.8"]


def test_a_column_of_settings_has_only_numbers_and_gaps_in_csv(tmp_path):
    write(tmp_path, config("Finetune", 0), 0.4)
    for strength in (1.0, 100.0):
        write(tmp_path, config("EWC", 0, strength=strength), 0.6)
    groups = group_runs(read(tmp_path).runs)
    for text in (to_csv(make_table(groups, ["average_accuracy"])), runs_to_csv(groups)):
        assert {row["strategy.strength"] for row in csv.DictReader(StringIO(text))} == {"", "1", "100"}
    assert "| finetune | – |" in to_markdown(make_table(groups, ["average_accuracy"]), ALL)


def test_csv_has_every_number_unrounded(groups):
    table = make_table(groups, ["average_accuracy"], "finetune")
    ewc, finetune = csv.DictReader(StringIO(to_csv(table)))
    assert finetune["seeds"] == "0 1 2"
    assert float(finetune["average_accuracy"]) == pytest.approx(0.5)
    assert float(finetune["average_accuracy_std"]) == pytest.approx(0.1)
    assert float(finetune["average_accuracy_sem"]) == pytest.approx(0.1 / 3**0.5)
    assert float(finetune["average_accuracy_low"]) == pytest.approx(0.5 - 4.302653 * 0.1 / 3**0.5)
    assert (finetune["average_accuracy_difference"], finetune["average_accuracy_pairs"]) == ("", "0")
    assert float(ewc["average_accuracy_difference"]) == pytest.approx(0.15)
    assert float(ewc["average_accuracy_difference_high"]) == pytest.approx(0.15 + 12.7062 * 0.05, abs=1e-5)
    assert ewc["average_accuracy_pairs"] == "2"


def test_latex_escapes_what_latex_would_read(groups):
    text = to_latex(make_table(groups, ["average_accuracy"], "finetune"), ["std"])
    assert r"average\_accuracy (\%) & $\Delta$ to finetune & n \\" in text
    assert r"finetune & 50.0 $\pm$ 10.0 &  & 3 \\" in text
    assert r"[$-$48.5, 78.5]" in text
    assert text.count("&") == 3 * 3
    assert r"\begin{tabular}{lrrr}" in text


def test_the_terminal_shows_brackets_as_they_are(groups):
    table = make_table(groups, ["average_accuracy"])
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(to_rich(table.heads(), table.cells(ALL), 1))
    assert "[25.2, 74.8]" in capture.get()


def test_the_usual_metrics_are_those_that_some_run_has(groups):
    assert make_table(groups).metrics == ["average_accuracy", "average_forgetting", "seconds"]


def test_an_unknown_metric_is_refused_with_the_nearest(groups):
    with pytest.raises(ConfigError, match="did you mean average_accuracy"):
        make_table(groups, ["averge_accuracy"])


def test_a_value_that_some_seeds_lack_says_of_how_many_it_is(tmp_path):
    for seed, moved in enumerate((0.5, None, 0.7)):
        write(tmp_path, config(seed=seed), metrics={"drift_kl": moved})
    table = make_table(group_runs(read(tmp_path).runs), ["drift_kl"])
    assert table.cells(["std"])[0][1] == "0.60 ± 0.14 (n=2)"


def test_digits_are_as_many_as_let_the_spread_be_seen(tmp_path):
    for seed, accuracy in enumerate((0.9901, 0.9903)):
        write(tmp_path, config(seed=seed), accuracy)
    table = make_table(group_runs(read(tmp_path).runs), ["average_accuracy"])
    assert table.cells(["std"])[0][1] == "99.02 ± 0.01"


def test_nothing_is_minus_zero(tmp_path):
    write(tmp_path, config(), -0.0001)
    assert make_table(group_runs(read(tmp_path).runs), ["average_accuracy"]).cells([])[0][1] == "0.0"


@pytest.fixture
def grid(tmp_path):
    for lr in (0.1, 0.2):
        write(tmp_path, config("Finetune", lr=lr))
        for strength in (1e4, 1e5):
            write(tmp_path, config("EWC", lr=lr, strength=strength))
    return group_runs(read(tmp_path).runs)


def test_of_several_baselines_each_row_has_the_one_that_agrees_with_it(grid):
    found = {grid.label(group): grid.label(baseline) for group, baseline in find_baselines(grid, "finetune").items()}
    assert found["ewc strength=1e4 lr=0.1"] == "finetune lr=0.1"
    assert found["ewc strength=1e5 lr=0.2"] == "finetune lr=0.2"
    assert found["finetune lr=0.1"] == "finetune lr=0.1"


@pytest.mark.parametrize("asked", ["strategy=ewc,strength=10000,lr=0.1", "ewc strength=1e4 lr=0.1"])
def test_a_baseline_named_by_its_keys_or_as_the_table_does_is_that_of_all(grid, asked):
    found = find_baselines(grid, asked)
    assert {grid.label(baseline) for baseline in found.values()} == {"ewc strength=1e4 lr=0.1"}
    assert len(found) == len(grid)


def test_a_baseline_that_may_be_several_or_is_none_is_refused(grid):
    with pytest.raises(ConfigError, match="which may be any of: ewc strength=1e4 lr=0.1; ewc strength=1e5"):
        find_baselines(grid, "ewc")
    with pytest.raises(ConfigError, match="there are: ewc strength=1e4"):
        find_baselines(grid, "lwf")
    with pytest.raises(ConfigError, match="there are: ewc strength=1e4"):
        find_baselines(grid, "ewc strength=3 lr=0.1")  # as a row could be called
    with pytest.raises(ConfigError, match="expected one value of strategy, got 'ewc,strategy=finetune'"):
        find_baselines(grid, "ewc,strategy=finetune")


def test_a_baseline_that_agrees_with_no_row_is_none_of_theirs(tmp_path):
    for strategy, lr in (("EWC", 0.2), ("Finetune", 0.1), ("Finetune", 0.3)):
        write(tmp_path, config(strategy, lr=lr))
    groups = group_runs(read(tmp_path).runs)
    found = find_baselines(groups, "finetune")
    assert {groups.label(group) for group in found} == {"finetune lr=0.1", "finetune lr=0.3"}


def test_a_baseline_that_every_row_is_is_refused(tmp_path):
    for lr in (0.1, 0.2):
        write(tmp_path, config("EWC", lr=lr))
    with pytest.raises(ConfigError, match="got 'ewc', which all rows are"):
        find_baselines(group_runs(read(tmp_path).runs), "ewc")
