"""Runs that are loaded without their checkpoint; `test_resume.py` loads every method with it."""

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.folder import RunFolder
from cl_runner.job import carry_out
from cl_runner.learned import load
from cl_runner.strategies import Finetune

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
        ["strategy=lora"],
        ["strategy=combined", "stream.scenario=class", "optimizer.lr=0.01"],
    ],
    ids=lambda words: words[0],
)
def test_the_file_of_weights_is_enough_where_the_network_predicts_alone(words, tmp_path):
    folder = finished(tmp_path, *words)
    learned = load(folder.path, device="cpu")
    matrices = folder.results["accuracy"]
    assert learned.accuracies() == {name: rows[-1] for name, rows in matrices.items()}


def test_a_model_is_loaded_in_eval_mode_and_without_drawing_from_the_global_generator(tmp_path):
    folder = finished(tmp_path, "strategy=finetune", "stream.augment=[crop]")
    torch.manual_seed(3)
    learned = load(folder.path, device="cpu")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert not any(module.training for module in learned.model.modules())


@pytest.mark.parametrize("strategy", ["er", "icarl"])
def test_a_checkpoint_from_before_the_end_is_never_taken_for_the_last(strategy, tmp_path):
    words = [f"strategy={strategy}", "stream.scenario=class", "optimizer.lr=0.01", "trainer.keep_checkpoint=true"]
    folder = finished(tmp_path, *words)
    last = folder.path / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    if strategy == "icarl":
        with pytest.raises(ConfigError, match=r"folder: expected the run's last checkpoint in .*, got none that fits"):
            load(folder.path, device="cpu")
    else:
        last_rows = {name: rows[-1] for name, rows in folder.results["accuracy"].items()}
        assert load(folder.path, device="cpu").accuracies() == last_rows


def test_what_setup_draws_is_what_it_drew_in_the_run(tmp_path, monkeypatch):
    setup = Finetune.setup

    def drawing(self, model, stream):
        setup(self, model, stream)
        self.turn = torch.randn(stream.num_classes, stream.num_classes)

    monkeypatch.setattr(Finetune, "setup", drawing)
    monkeypatch.setattr(Finetune, "predict", lambda self, images, task_ids: self.model(images).logits @ self.turn)
    folder = finished(tmp_path, "strategy=finetune", "trainer.keep_checkpoint=true")
    last_rows = {name: rows[-1] for name, rows in folder.results["accuracy"].items()}
    assert load(folder.path, device="cpu").accuracies() == last_rows


def test_a_folder_that_was_moved_is_loaded_where_it_is(tmp_path):
    folder = finished(tmp_path, "strategy=finetune")
    there = tmp_path / "elsewhere" / folder.path.name
    there.parent.mkdir()
    folder.path.rename(there)
    (there / "config.yaml").unlink()
    assert load(there, device="cpu", data_root="nowhere").experiment.folder == there


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=icarl"],
        ["strategy=lora", "strategy.merge=false"],
        ["strategy=lucir", "stream.scenario=class"],
        ["strategy=combined", "strategy@strategy.parts.er=icarl"],
    ],
    ids=" ".join,
)
def test_of_a_method_that_keeps_more_the_checkpoint_is_asked_for(words, tmp_path):
    folder = finished(tmp_path, *words)
    said = "keep_checkpoint: expected true .*rerun=true.* predicts by what is in the checkpoint"
    with pytest.raises(ConfigError, match=said):
        load(folder.path, device="cpu")


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected that of a finished run, got .*nowhere', which is no run's folder"):
        load(tmp_path / "nowhere")
    folder = finished(tmp_path, "strategy=finetune")
    with pytest.raises(ConfigError, match="which is no run's folder"):
        load(tmp_path)
    folder.update_status(state="failed")
    with pytest.raises(ConfigError, match="got .*finetune.*', which is failed"):
        load(folder.path)


def test_in_the_task_scenario_a_prediction_needs_a_task_and_is_among_its_classes(tmp_path):
    learned = load(finished(tmp_path, "strategy=finetune").path, device="cpu")
    images = learned.stream.tasks[0].test.images
    assert set(learned.predict(images, task=3).tolist()) <= set(learned.stream.tasks[3].classes)
    assert learned.predict(images[:0], task=3).tolist() == []
    refused = {
        None: "expected `task`, the images' task",
        5: "from 0 to 4",
        -1: "4, got -1",
        "1": "got '1'",
        2.0: "got 2.0",
    }
    for task, says in refused.items():
        with pytest.raises(ValueError, match=says):
            learned.predict(images, task)


def test_images_of_another_form_than_the_streams_are_refused(tmp_path):
    learned = load(finished(tmp_path, "strategy=finetune", "stream.scenario=class").path, device="cpu")
    images = learned.stream.tasks[0].test.images
    _, channels, height, width = images.shape
    for wrong in (images.float(), images[0], images[..., 1:], images.numpy()):
        with pytest.raises(ValueError, match=rf"torch\.uint8 \['N', {channels}, {height}, {width}\], got "):
            learned.predict(wrong)


def test_in_the_class_scenario_the_task_changes_nothing(tmp_path):
    learned = load(finished(tmp_path, "strategy=er", "stream.scenario=class").path, device="cpu")
    images = torch.cat([task.test.images for task in learned.stream.tasks])
    assert torch.equal(learned.predict(images), learned.predict(images, task=4))
