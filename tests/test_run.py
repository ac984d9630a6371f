import os
import subprocess
import sys

import pytest

from cl_runner.folder import RunFolder
from cl_runner.job import carry_out
from tests.test_resume import VIT, experiment

pytestmark = pytest.mark.usefixtures("no_picture")

VALIDATED = "stream.validation=0.2"


def finished(experiment):
    """What a run measured, and its outcome."""
    outcome = carry_out(experiment)
    return RunFolder(experiment.folder).results, outcome


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    return finished(experiment(tmp_path_factory.mktemp("validated"), "strategy=finetune", VALIDATED))


def test_the_outcome_is_the_validation_accuracy_where_there_is_a_split(tmp_path, validated):
    results, outcome = validated
    assert outcome == results["metrics"]["validation_accuracy"]
    results, outcome = finished(experiment(tmp_path, "strategy=finetune"))
    assert outcome == results["metrics"]["average_accuracy"]
    assert (results["validation"], results["metrics"]["validation_accuracy"]) == ({}, None)


def test_a_finished_run_has_the_same_outcome_again(tmp_path):
    first, again = (carry_out(experiment(tmp_path, "strategy=finetune", VALIDATED)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("words", "active"),
    [
        (["strategy=finetune"], "seen"),
        (["strategy=slca", "strategy.epochs=1"], "current"),
        (["strategy=slca", "strategy.epochs=1", "trainer.active_logits=all"], "all"),
        (["strategy=l2p", *VIT], "current"),
        (["strategy=dualprompt", *VIT], "current"),
        (["strategy=coda_prompt", *VIT], "current"),
        (["strategy=ease", *VIT], "current"),
        (["strategy=lwf"], "current"),
        (["strategy=der"], "all"),
        (["strategy=derpp"], "all"),
        (["strategy=derpp", "trainer.active_logits=seen"], "seen"),
    ],
)
def test_the_loss_sees_the_outputs_that_the_methods_paper_has_it_see_unless_told_otherwise(words, active, tmp_path):
    made = experiment(tmp_path, "stream.scenario=class", "stream.max_tasks=1", *words)
    carry_out(made)
    assert made.strategy.model.active_logits == active


def test_validation_is_measured_after_each_task_on_the_tasks_learned_so_far(validated):
    results, _ = validated
    rows = results["validation"]["task"]
    assert [[value is None for value in row] for row in rows] == [[j > i for j in range(5)] for i in range(5)]
    measured = results["metrics"]
    assert measured["validation_accuracy"] == measured["validation_accuracy/task"] == pytest.approx(sum(rows[-1]) / 5)
    assert measured["validation_accuracy/class"] == pytest.approx(sum(results["validation"]["class"][-1]) / 5)
    assert set(results["validation"]) == set(results["accuracy"])


def test_a_task_without_validation_images_is_left_out_and_no_reason_to_look_no_more(tmp_path):
    made = experiment(tmp_path, "strategy=finetune", VALIDATED)
    load = made.stream.load

    def without(*words):
        stream = load(*words)
        build = stream.tasks[4]._build
        stream.tasks[4]._build = lambda split: build(split)[:0] if split == "validation" else build(split)
        return stream

    object.__setattr__(made.stream, "load", without)
    results, _ = finished(made)
    last = results["validation"]["task"][-1]
    assert [value is None for value in last] == [False] * 4 + [True]
    assert results["metrics"]["validation_accuracy"] == pytest.approx(sum(last[:4]) / 4)


def test_where_tasks_share_their_classes_validation_still_does_not_look_ahead(tmp_path):
    results, _ = finished(experiment(tmp_path, "strategy=finetune", "stream.scenario=domain", VALIDATED))
    assert results["accuracy"]["domain"][0][4] is not None
    assert [value is None for value in results["validation"]["domain"][0]] == [False, True, True, True, True]


def test_a_later_run_in_the_process_can_be_deterministic_on_a_gpu():
    says = "import cl_runner, os, sys; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", says], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ":4096:8 False\n"
