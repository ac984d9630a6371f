"""Selection by validation accuracy."""

import pytest

from cl_runner.errors import ConfigError
from cl_runner.report.groups import group_runs
from cl_runner.report.runs import read
from cl_runner.report.selection import select
from tests.report.samples import STAIRS, Rows, config, write


def stairs(first: float, last: float) -> Rows:
    """A validation matrix with mean `first` after the first task, and `last` after the third."""
    return [[first, None, None], [0.5, 0.5, None], [last, last, last]]


def choice(folder, tasks=None, within=()):
    groups = group_runs(read(folder).runs)
    picks, warnings = select(groups, tasks, within)
    return {groups.label(pick.group): pick for pick in picks}, warnings


def test_the_choice_follows_validation_where_test_says_the_opposite(tmp_path):
    for strength, test, validation in ((1.0, 0.99, 0.6), (10.0, 0.10, 0.7)):
        for seed in (0, 1):
            settings = config("EWC", seed, strength=strength)
            rows: Rows = [[test, None, None], [test, test, None], [test, test, test]]
            write(tmp_path, settings, test, rows=rows, validation=stairs(validation, validation))
    picks, warnings = choice(tmp_path)
    assert list(picks) == ["ewc strength=10"]
    assert (picks["ewc strength=10"].validation.mean, picks["ewc strength=10"].candidates) == (pytest.approx(0.7), 2)
    assert not warnings


def test_test_accuracy_may_be_anything_and_the_choice_stays(tmp_path):
    chosen = set()
    for number, tests in enumerate(((0.0, 1.0), (1.0, 0.0))):
        for strength, test, validation in zip((1.0, 10.0), tests, (0.8, 0.6), strict=True):
            settings = config("EWC", strength=strength)
            write(tmp_path / str(number), settings, test, validation=stairs(validation, validation))
        chosen |= choice(tmp_path / str(number))[0].keys()
    assert chosen == {"ewc strength=1"}


def test_the_first_tasks_alone_may_decide(tmp_path):
    write(tmp_path, config("EWC", strength=1.0), validation=stairs(first=0.9, last=0.3))
    write(tmp_path, config("EWC", strength=2.0), validation=stairs(first=0.8, last=0.4))
    assert list(choice(tmp_path, tasks=1)[0]) == ["ewc strength=1"]
    assert list(choice(tmp_path, tasks=3)[0]) == ["ewc strength=2"]
    assert choice(tmp_path, tasks=2)[0]["ewc strength=1"].validation.mean == 0.5


def test_who_is_as_good_as_the_chosen_one_is_named(tmp_path):
    for strength in (1.0, 2.0):
        write(tmp_path, config("EWC", strength=strength), validation=stairs(0.9, 0.5))
    picks, (warning,) = choice(tmp_path)
    assert list(picks) == ["ewc strength=1"]
    assert "1 with the same validation accuracy, ewc strength=2 among them" in warning


def test_every_strategy_has_its_own_choice_unless_told_otherwise(tmp_path):
    for strategy in ("L1", "L2"):
        for lr, validation in ((0.1, 0.5), (0.2, 0.6)):
            write(tmp_path, config(strategy, lr=lr), validation=stairs(0.5, validation))
    assert list(choice(tmp_path)[0]) == ["l1 lr=0.2", "l2 lr=0.2"]
    assert list(choice(tmp_path, within=["lr"])[0]) == ["l1 lr=0.1", "l1 lr=0.2"]


def test_streams_are_never_chosen_between(tmp_path):
    for name, validation in (("digits", 0.9), ("mnist", 0.5)):
        settings = config("EWC")
        settings["stream"]["name"] = name
        write(tmp_path, settings, validation=stairs(0.5, validation))
    assert len(choice(tmp_path)[0]) == 2


@pytest.mark.parametrize(("key", "values"), [("class_order", ([0, 1], [1, 0])), ("max_per_class", (50, None))])
def test_tasks_of_several_kinds_are_never_chosen_between(tmp_path, key, values):
    for value, validation in zip(values, (0.9, 0.5), strict=True):
        settings = config("EWC")
        settings["stream"][key] = value
        write(tmp_path, settings, validation=stairs(0.5, validation))
    assert len(choice(tmp_path)[0]) == 2


def test_memories_of_several_sizes_are_never_chosen_between(tmp_path):
    for size, validation in ((200, 0.5), (500, 0.9)):
        write(tmp_path, config("ER", memory={"size": size}), validation=stairs(0.5, validation))
    assert len(choice(tmp_path)[0]) == 2


def test_the_last_accuracy_is_enough_where_all_tasks_decide(tmp_path):
    write(tmp_path, config("EWC", strength=1.0), metrics={"validation_accuracy": 0.4})
    write(tmp_path, config("EWC", strength=2.0), metrics={"validation_accuracy": 0.6})
    assert list(choice(tmp_path)[0]) == ["ewc strength=2"]
    picks, warnings = choice(tmp_path, tasks=1)
    assert not picks
    assert "ewc strength=1 has no validation accuracy after task 1: it cannot be chosen" in warnings


def test_runs_without_a_validation_split_cannot_be_chosen_and_where_none_has_one_are_refused(tmp_path):
    write(tmp_path, config("EWC", strength=2.0), validation=[[None] * 3] * 3)
    with pytest.raises(ConfigError, match=r"--select: expected runs with a validation split .*, got none"):
        choice(tmp_path)
    write(tmp_path, config("EWC", strength=1.0), validation=stairs(0.5, 0.5))
    picks, warnings = choice(tmp_path)
    assert list(picks) == ["ewc strength=1"]
    assert warnings == ["ewc strength=2 has no validation accuracy after the last task: it cannot be chosen"]


def test_more_tasks_than_there_are_are_refused(tmp_path):
    write(tmp_path, config(), validation=stairs(0.5, 0.5))
    with pytest.raises(ConfigError, match="at most 3"):
        choice(tmp_path, tasks=4)


def test_what_was_not_looked_at_then_cannot_be_chosen_and_is_named(tmp_path):
    write(tmp_path, config("Joint"), rows=STAIRS, validation=[[None] * 3, [None] * 3, [0.9, 0.9, 0.9]])
    picks, warnings = choice(tmp_path, tasks=2)
    assert not picks
    assert warnings == ["joint has no validation accuracy after task 2: it cannot be chosen"]
    assert list(choice(tmp_path)[0]) == ["joint"]


def test_candidates_of_different_seeds_are_warned_of(tmp_path):
    write(tmp_path, config("EWC", 0, strength=1.0), validation=stairs(0.5, 0.5))
    write(tmp_path, config("EWC", 1, strength=2.0), validation=stairs(0.5, 0.6))
    assert choice(tmp_path)[1] == ["ewc strength=2 was chosen from 2 groups that have no seed in common"]


def test_candidates_are_compared_on_the_seeds_that_all_have(tmp_path):
    write(tmp_path, config("EWC", 0, strength=1.0), validation=stairs(0.5, 0.6))
    for seed, accuracy in ((0, 0.5), (1, 0.9)):
        write(tmp_path, config("EWC", seed, strength=2.0), validation=stairs(0.5, accuracy))
    picks, warnings = choice(tmp_path)
    assert list(picks) == ["ewc strength=1"]
    assert warnings == ["ewc strength=1 was chosen by the runs whose seeds all candidates have: 0"]


def test_what_cannot_be_chosen_does_not_narrow_the_seeds(tmp_path):
    for strength, accuracies in ((1.0, (0.5, 0.9)), (2.0, (0.6, 0.6))):
        for seed, accuracy in enumerate(accuracies):
            write(tmp_path, config("EWC", seed, strength=strength), validation=stairs(accuracy, 0.5))
    write(tmp_path, config("EWC", 0, strength=3.0), validation=[[None] * 3, [None] * 3, [0.9, 0.9, 0.9]])
    picks, warnings = choice(tmp_path, tasks=1)
    assert list(picks) == ["ewc strength=1"]
    assert warnings == ["ewc strength=3 has no validation accuracy after task 1: it cannot be chosen"]
