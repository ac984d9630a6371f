import json

import pytest
import torch
from safetensors.torch import load_file

from cl_runner.compose import compose_jobs
from cl_runner.config import check
from cl_runner.folder import RunFolder
from cl_runner.run import run
from cl_runner.trackers.base import Null

STRATEGIES = ["finetune", "joint", "cumulative", "independent", "frozen", "ncm", "l1", "l2", "dropout", "ewc", "lwf"]
SMALL = ["trainer.epochs=1", "tracker=local", "device=cpu"]
MLP = ["model=mlp", "model.widths=[12]", "model.dropout=0.1"]


class Power(Null):
    """Goes out after some tasks."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def step(self, row):
        if row["task"] == self.tasks:
            raise ConnectionAbortedError


def experiment(tmp_path, *overrides):
    (cfg,) = compose_jobs([*SMALL, *([] if "model=cnn" in overrides else MLP), f"output_root={tmp_path}", *overrides])
    return check(cfg)


def carry_out(experiment, name, watchers=()):
    folder = RunFolder(experiment.folder.parent / name)
    folder.path.mkdir(exist_ok=True)
    return run(experiment, folder, watchers), folder.path


def without_timing(path):
    rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        del row["timing"]
    return rows


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights with a head, for the strategies that hold the pretrained model too."""
    folder = tmp_path_factory.mktemp("pretrained")
    _, path = carry_out(experiment(folder, "strategy=finetune"), "weights")
    return path / "model.safetensors"


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one(strategy, tasks, tmp_path, pretrained):
    overrides = [f"strategy={strategy}", f"model.pretrained={pretrained}", "optimizer=sgd", "optimizer.momentum=0.9"]
    if tasks == 3:
        overrides.append("trainer.optimizer_state=keep")
    if strategy == "ewc":
        overrides += ["strategy.strength=10", f"strategy.accumulation={'sum' if tasks == 3 else 'separate'}"]
    whole, whole_path = carry_out(experiment(tmp_path, *overrides), "whole")
    if strategy != "ncm":  # trains nothing: no step to be stopped at
        stop = 4 if strategy == "joint" else tasks  # joint learns in its last task alone
        with pytest.raises(ConnectionAbortedError):
            carry_out(experiment(tmp_path, *overrides), "stopped", [Power(stop)])
    resumed, resumed_path = carry_out(experiment(tmp_path, *overrides), "stopped")

    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["zero_shot"] == whole["zero_shot"]
    assert without_timing(resumed_path) == without_timing(whole_path)
    one, other = load_file(whole_path / "model.safetensors"), load_file(resumed_path / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "step"])
def test_what_carries_over_between_tasks_carries_over_a_stop(scheduler, tmp_path):
    overrides = ["model=cnn", "model.widths=[4,8]", "model.norm_stats=adapt", "optimizer=adam"]
    overrides += ["trainer.optimizer_state=keep", f"scheduler={scheduler}", "stream.scenario=class", "strategy=ewc"]
    overrides += ["strategy.accumulation=sum", "stream.augment=[crop]", "fisher.num_samples=20"]
    whole, whole_path = carry_out(experiment(tmp_path, *overrides), "whole")
    with pytest.raises(ConnectionAbortedError):
        carry_out(experiment(tmp_path, *overrides), "stopped", [Power(3)])
    resumed, resumed_path = carry_out(experiment(tmp_path, *overrides), "stopped")
    assert resumed["metrics"] == whole["metrics"]
    assert without_timing(resumed_path) == without_timing(whole_path)


def test_ncm_resumes_from_its_sums(tmp_path):
    class PowerAtTask(Null):
        def task(self, row):
            if row["task"] == 2:
                raise ConnectionAbortedError

    whole, _ = carry_out(experiment(tmp_path, "strategy=ncm"), "whole")
    with pytest.raises(ConnectionAbortedError):
        carry_out(experiment(tmp_path, "strategy=ncm"), "stopped", [PowerAtTask()])
    resumed, _ = carry_out(experiment(tmp_path, "strategy=ncm"), "stopped")
    assert resumed["accuracy"] == whole["accuracy"]


def test_a_finished_run_keeps_no_checkpoint_unless_asked_to(tmp_path):
    _, path = carry_out(experiment(tmp_path, "strategy=finetune"), "one")
    assert not (path / "checkpoint").exists()
    _, path = carry_out(experiment(tmp_path, "strategy=finetune", "trainer.keep_checkpoint=true"), "two")
    assert (path / "checkpoint" / "last.pt").exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign"])
def test_a_checkpoint_that_is_damaged_or_anothers_is_refused(damage, tmp_path, caplog):
    overrides = ["strategy=finetune"]
    whole, _ = carry_out(experiment(tmp_path, *overrides), "whole")
    with pytest.raises(ConnectionAbortedError):
        carry_out(experiment(tmp_path, *overrides), "stopped", [Power(2)])
    file = tmp_path / "stopped" / "checkpoint" / "last.pt"
    content = bytearray(file.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        with pytest.raises(ConnectionAbortedError):
            carry_out(experiment(tmp_path, *overrides, "seed=1"), "other", [Power(2)])
        content = (tmp_path / "other" / "checkpoint" / "last.pt").read_bytes()
    file.write_bytes(content)
    with caplog.at_level("WARNING", logger="cl_runner"):
        resumed, _ = carry_out(experiment(tmp_path, *overrides), "stopped")
    assert "starting from the beginning" in caplog.text
    assert resumed["accuracy"] == whole["accuracy"]
