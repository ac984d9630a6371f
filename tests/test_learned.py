"""Runs that are loaded without their checkpoint; `test_resume.py` loads every method with it."""

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.job import carry_out
from cl_runner.learned import load
from cl_runner.streams.base import Scenario

from .test_resume import experiment

pytestmark = pytest.mark.usefixtures("no_picture")


def finished(tmp_path, *overrides):
    made = experiment(tmp_path, *overrides)
    carry_out(made)
    return RunFolder(made.folder)


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=er", "stream.scenario=class", "optimizer.lr=0.01"],
        ["strategy=frozen"],
        ["strategy=finetune", "stream.scenario=domain", "model=cnn", "model.widths=[4,8]", "model.norm_stats=adapt"],
    ],
    ids=lambda words: words[0],
)
def test_the_file_of_weights_is_enough_where_the_network_predicts_alone(words, tmp_path):
    folder = finished(tmp_path, *words)
    learned = load(folder.path, device="cpu")
    matrices = folder.results["accuracy"]
    assert learned.accuracies() == {Scenario(name): rows[-1] for name, rows in matrices.items()}


def test_of_a_method_that_keeps_more_the_checkpoint_is_asked_for(tmp_path):
    folder = finished(tmp_path, "strategy=icarl")
    with pytest.raises(
        ConfigError, match="keep_checkpoint: expected true .* ICaRL predicts by what is in the checkpoint"
    ):
        load(folder.path, device="cpu")


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected that of a finished run, got .*nowhere"):
        load(tmp_path / "nowhere")


def test_in_the_task_scenario_a_prediction_needs_a_task_and_is_among_its_classes(tmp_path):
    learned = load(finished(tmp_path, "strategy=finetune").path, device="cpu")
    images = learned.stream.tasks[0].test.images
    assert set(learned.predict(images, task=3).tolist()) <= set(learned.stream.tasks[3].classes)
    assert learned.predict(images[:0], task=3).tolist() == []
    for task, says in ((None, "expected the task"), (5, "from 0 to 4"), (-1, "from 0 to 4")):
        with pytest.raises(ValueError, match=says):
            learned.predict(images, task)


def test_in_the_class_scenario_the_task_changes_nothing(tmp_path):
    learned = load(finished(tmp_path, "strategy=er", "stream.scenario=class").path, device="cpu")
    images = torch.cat([task.test.images for task in learned.stream.tasks])
    assert torch.equal(learned.predict(images), learned.predict(images, task=4))
