"""Which runs form a row, and which keys name it."""

import pytest

from cl_runner.errors import ConfigError
from cl_runner.report.groups import group_runs, short_names, shown
from cl_runner.report.runs import read
from tests.report.samples import STAIRS, config, write


def grouped(folder, *by):
    return group_runs(read(folder).runs, by)


def labels(groups):
    return {groups.label(group): group.seeds for group in groups}


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path):
    for strategy in ("EWC", "Finetune"):
        for seed in (2, 0, 1):
            write(tmp_path, config(strategy, seed))
    groups = grouped(tmp_path)
    assert groups.keys == ["strategy"]
    assert labels(groups) == {"ewc": [0, 1, 2], "finetune": [0, 1, 2]}


def test_columns_are_the_keys_that_differ_with_the_strategy_first(tmp_path):
    for lr in (0.1, 0.01):
        write(tmp_path, config("EWC", lr=lr, strength=10.0, anchor="previous"))
        write(tmp_path, config("EWC", lr=lr, strength=1000.0, anchor="previous"))
        write(tmp_path, config("Finetune", lr=lr))
    groups = grouped(tmp_path)
    assert groups.keys == ["strategy", "strategy.strength", "optimizer.lr"]
    assert groups.names == ["strategy", "strength", "lr"]
    assert "finetune lr=0.01" in labels(groups)
    assert "ewc strength=1000 lr=0.1" in labels(groups)


def test_what_only_the_choice_of_a_component_brings_is_no_column(tmp_path):
    write(tmp_path, config("EWC", strength=10.0))
    write(tmp_path, config("L2", strength=1.0))
    write(tmp_path, config("Finetune"))
    assert grouped(tmp_path).keys == ["strategy"]


def test_the_same_component_of_several_strategies_may_differ(tmp_path):
    for strategy, kind, size in (("ER", "Reservoir", 20), ("DER", "Reservoir", 200), ("GEM", "ClassBalanced", 50)):
        write(tmp_path, config(strategy, memory={"_target_": f"cl_runner.memory.{kind}", "size": size}))
    groups = grouped(tmp_path)
    assert groups.keys == ["strategy", "strategy.memory.size"]
    assert {"er size=20", "der size=200"} <= labels(groups).keys()


def test_a_part_of_a_combined_method_is_not_compared_with_the_method_alone(tmp_path):
    ewc = {"_target_": "cl_runner.strategies.EWC", "strength": 10.0}
    write(tmp_path, config("Combined", parts={"ewc": ewc}))
    write(tmp_path, config("EWC", strength=1.0))
    assert grouped(tmp_path).keys == ["strategy"]


def test_what_changes_no_number_makes_no_group(tmp_path):
    here, there = config(seed=0), config(seed=1)
    there |= {"device": "cuda", "data_root": "/elsewhere", "output_root": "other"}
    there["fisher"] = {"_target_": "cl_runner.fisher.estimators.Exact", "seed": 1}
    there["tracker"] = {"_target_": "cl_runner.trackers.wandb.WandB", "project": "p"}
    write(tmp_path, here)
    write(tmp_path, there)
    assert len(grouped(tmp_path)) == 1


def test_a_seed_set_apart_names_the_rows_though_one_run_of_each_has_the_same(tmp_path):
    for fixed in (0, 1):
        for seed in (0, 1):
            settings = config(seed=seed)
            settings["stream"]["seed"] = fixed
            write(tmp_path, settings, status={"groups": [f"fixed-{fixed}"]})
    assert labels(grouped(tmp_path)) == {"finetune seed=0": [0, 1], "finetune seed=1": [0, 1]}


def test_a_run_counts_in_every_group_that_it_is_one_of(tmp_path):
    for seed in (0, 1, 2):
        settings = config(seed=seed)
        settings["stream"]["seed"] = 0
        write(tmp_path, settings, status={"groups": ["alone", "fixed"] if seed == 0 else ["fixed"]})
    assert sorted(labels(grouped(tmp_path)).values()) == [[0], [0, 1, 2]]


def test_a_key_that_follows_the_seed_makes_no_group(tmp_path):
    for seed in (1, 2, 3):
        settings = config(seed=seed)
        settings["stream"]["class_order"] = seed
        write(tmp_path, settings)
    assert labels(grouped(tmp_path)) == {"finetune": [1, 2, 3]}


def test_a_seed_that_was_set_apart_makes_a_group(tmp_path):
    for seed in (1, 2):
        settings = config(seed=seed)
        write(tmp_path, settings)
        settings = config(seed=seed)
        settings["stream"]["seed"] = 7
        write(tmp_path, settings)
    assert sorted(labels(grouped(tmp_path)).values()) == [[1, 2], [1, 2]]


def test_the_group_that_a_run_names_itself_counts_where_all_do(tmp_path):
    for seed in (0, 1):
        for fixed, group in ((seed, "aaaa1111"), (0, "bbbb2222")):
            settings = config(seed=seed)
            settings["stream"]["seed"] = fixed
            write(tmp_path, settings, status={"groups": [group]})
    assert sorted(group.seeds for group in grouped(tmp_path)) == [[0, 1], [0, 1]]


def test_runs_of_streams_of_different_length_are_never_one_group(tmp_path):
    write(tmp_path, config(seed=0))
    write(tmp_path, config(seed=1), rows=[row[:2] for row in STAIRS[:2]])
    for groups in (grouped(tmp_path), grouped(tmp_path, "strategy")):
        assert groups.keys == ["strategy", "tasks"]
        assert labels(groups) == {"finetune tasks=3": [0], "finetune tasks=2": [1]}


@pytest.mark.parametrize("by", [[], ["strategy"]], ids=["all keys", "by strategy"])
def test_of_two_runs_of_the_same_work_the_later_counts_and_the_other_is_named(by, tmp_path):
    write(tmp_path, config(), accuracy=0.1, status={"finished": 2.0}, name="old")
    write(tmp_path, config(), accuracy=0.9, status={"finished": 5.0}, name="new")
    groups = grouped(tmp_path, *by)
    assert groups.groups[0].by_seed("average_accuracy") == {0: 0.9}
    assert [(run.folder, run.state) for run in groups.left_out] == [("old", "twice")]


def test_keys_chosen_by_hand_pool_the_rest_and_say_so(tmp_path):
    write(tmp_path, config("EWC", seed=0, lr=0.1, strength=10.0))
    write(tmp_path, config("EWC", seed=1, lr=0.2, strength=10.0))
    groups = grouped(tmp_path, "strength")
    assert groups.keys == ["strategy", "strategy.strength"]
    assert labels(groups) == {"ewc strength=10": [0, 1]}
    assert groups.pooled == ["optimizer.lr"]


def test_keys_that_leave_two_runs_of_a_seed_together_are_refused(tmp_path):
    write(tmp_path, config("EWC", lr=0.1, strength=10.0))
    write(tmp_path, config("EWC", lr=0.2, strength=10.0))
    with pytest.raises(ConfigError, match=r"seed 0 2 times; add optimizer\.lr"):
        grouped(tmp_path, "strength")


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    write(tmp_path, config("EWC", strength=10.0))
    with pytest.raises(ConfigError, match="did you mean"):
        grouped(tmp_path, "strategy.strenght")


def test_of_keys_that_end_alike_the_one_that_differs_is_meant(tmp_path):
    for size in (16, 32):
        settings = config("EWC", fisher={"_target_": "cl_runner.fisher.estimators.Exact", "batch_size": size})
        settings["trainer"]["batch_size"] = 128
        write(tmp_path, settings)
    assert grouped(tmp_path, "batch_size").keys == ["strategy", "strategy.fisher.batch_size"]


def test_values_are_ordered_by_size_and_shown_as_one_types_them(tmp_path):
    for strength in (1e5, 9.0, 1e-3):
        write(tmp_path, config("EWC", strength=strength))
    assert list(labels(grouped(tmp_path))) == ["ewc strength=0.001", "ewc strength=9", "ewc strength=1e5"]
    assert [shown(value) for value in (None, True, 3, 0.25, 12345.0, "a")] == [
        *("null", "true", "3", "0.25", "1.2345e4", "a")
    ]


def test_a_short_name_is_the_end_that_no_other_key_has():
    assert short_names(["strategy", "a.seed", "b.seed", "a.b.lr"]) == ["strategy", "a.seed", "b.seed", "lr"]
