import json
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cl_runner.compose import compose_jobs
from cl_runner.config import check
from cl_runner.environment import environment
from cl_runner.folder import RunFolder
from cl_runner.learned import load
from cl_runner.listing import choices
from cl_runner.rerun import show
from cl_runner.run import run

pytestmark = pytest.mark.usefixtures("no_picture")

STRATEGIES = sorted(choices()["strategy"])
SMALL = ["trainer.epochs=1", "tracker=local", "device=cpu"]
MLP = ["model=mlp", "model.widths=[12]", "model.dropout=0.1"]
OFTEN = ["trainer.checkpoint_every=3", "trainer.log_every=4", "stream.validation=0.2"]  # rows span checkpoints
VIT = ["model=timm", "model.name=test_vit", "model.pretrained=false", "model.image_size=32", "stream.max_per_class=24"]
OWN = {
    **{name: ["stream.scenario=class"] for name in ("bic", "lucir")},
    "combined": ["strategy.parts.ewc.strength=10"],
    "ewc": ["strategy.strength=10"],
    "ranpac": ["strategy.projection=64"],
    "si": ["strategy.strength=1"],
    "slca": ["strategy.epochs=1"],
    **{name: [*VIT, "trainer.batch_size=6"] for name in ("coda_prompt", "dualprompt", "ease", "l2p")},
}


TRIED = []  # networks that have been tried on their images: the runs here have few


class PowerCutError(Exception):
    """Ends a run at once, like a power cut."""


def overrides_for(strategy, weights):
    """A small run of any strategy, from pretrained weights if there are any."""
    own = OWN.get(strategy, [])
    pretrained = [f"model.pretrained={weights}"] if weights and not set(VIT) & set(own) else []
    momentum = ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01"]
    return [*SMALL, *([] if set(VIT) & set(own) else MLP), *momentum, f"strategy={strategy}", *own, *pretrained]


@cache
def composed(*overrides):
    (cfg,) = compose_jobs(list(overrides))
    return cfg


def experiment(tmp_path, *overrides):
    own = any(word.startswith("model=") for word in overrides)
    cfg = composed(*SMALL, *([] if own else MLP), *overrides).copy()
    OmegaConf.update(cfg, "output_root", str(tmp_path))
    return check(cfg, TRIED)


def carry_out(experiment, name, watchers=()):
    folder = RunFolder(experiment.folder.parent / name)
    folder.path.mkdir(exist_ok=True)
    return run(experiment, folder, watchers), folder.path


def without_timing(path):
    rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    for row in rows:
        del row["timing"]
    return rows


def cut(experiment, *, steps=None, task=None):
    """Make an experiment end after some steps of this process, or once it has consolidated a task."""
    strategy, left = experiment.strategy, [steps]
    after_step, after_task = strategy.after_step, strategy.after_task

    def counted(batch, output):
        after_step(batch, output)
        left[0] -= 1
        if left[0] == 0:
            raise PowerCutError

    def named(done):
        after_task(done)
        if done.index == task:
            raise PowerCutError

    if steps is not None:
        strategy.after_step = counted
    strategy.after_task = named
    return experiment


def assert_equal_runs(whole, resumed):
    (results, path), (others, other_path) = whole, resumed
    for part in ("accuracy", "validation", "metrics", "zero_shot"):
        assert others[part] == results[part]
    assert without_timing(other_path) == without_timing(path)
    one, other = load_file(path / "model.safetensors"), load_file(other_path / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_predicts_as_it_was_measured(results, path):
    """The run that is loaded again has the accuracies of the matrices' last rows."""
    RunFolder(path).update_status(state="done")
    RunFolder(path).write_config(results["config"])
    learned = load(path, device="cpu")
    assert learned.accuracies() == {scenario: rows[-1] for scenario, rows in results["accuracy"].items()}
    for task in learned.stream.tasks:
        hits = learned.predict(task.test.images, task.index) == task.test.labels
        last = results["accuracy"][str(learned.stream.scenario)][-1][task.index]
        assert hits.double().mean().item() == pytest.approx(last, abs=1e-12)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights with a head, for strategies that use the pretrained model too."""
    folder = tmp_path_factory.mktemp("pretrained")
    _, path = carry_out(experiment(folder, "strategy=finetune"), "weights")
    return path / "model.safetensors"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_is_stopped_again_and_again_equals_an_uninterrupted_one(strategy, tmp_path, pretrained):
    words = [*overrides_for(strategy, pretrained), *OFTEN, "trainer.keep_checkpoint=true"]
    make = partial(experiment, tmp_path, *words)
    whole = carry_out(make(), "whole")
    assert_predicts_as_it_was_measured(*whole)
    trained = any(row["kind"] == "step" for row in without_timing(whole[1]))
    cuts = [{"steps": 5}, {"steps": 8}, {"task": 1}, {"steps": 13}] if trained else [{"task": 1}, {"task": 2}]
    for each in [{"steps": 5}, {"steps": 8}, {"task": 4}] if strategy == "joint" else cuts:
        with pytest.raises(PowerCutError):
            carry_out(cut(make(), **each), "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


def test_a_run_that_goes_on_at_another_commit_names_both(tmp_path, monkeypatch, caplog, capsys):
    at = environment(torch.device("cpu"))
    for task, commit in enumerate(["a", "a", "b", None]):
        monkeypatch.setattr("cl_runner.state.environment", lambda _, commit=commit: {**at, "commit": commit or "a"})
        wanted = experiment(tmp_path, "strategy=finetune")
        with nullcontext() if commit is None else pytest.raises(PowerCutError):
            ended = carry_out(wanted if commit is None else cut(wanted, task=task), wanted.folder.name)
        assert ("part of it was made with commit b (now a)" in caplog.text) == (commit is None)
    assert ended[0]["environment"]["commit"] == "a"
    assert [each["commit"] for each in ended[0]["earlier_environments"]] == ["b"]
    monkeypatch.setattr("cl_runner.rerun.environment", lambda _: {**at, "commit": "a"})
    show(wanted)
    assert "warning: part of it was made with commit b (now a)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "kept"),
    [
        (optimizer, scheduler, ("reset", "keep")[(first + second) % 2])
        for first, optimizer in enumerate(("sgd", "adam", "adamw"))
        for second, scheduler in enumerate(("constant", "cosine", "step"))
    ],
)
def test_what_an_optimizer_and_a_scheduler_have_gathered_is_there_again(optimizer, scheduler, kept, tmp_path):
    overrides = [
        "strategy=finetune",
        f"optimizer={optimizer}",
        *(["optimizer.momentum=0.9"] if optimizer == "sgd" else []),
        f"scheduler={scheduler}",
        f"trainer.optimizer_state={kept}",
    ]
    make = partial(experiment, tmp_path, *overrides, "optimizer.weight_decay=0.1", "trainer.epochs=2", *OFTEN)
    whole = carry_out(make(), "whole")
    for steps in (4, 17, 12):
        with pytest.raises(PowerCutError):
            carry_out(cut(make(), steps=steps), "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


@pytest.mark.parametrize(
    "budget",
    [
        ["trainer.iterations=13", "trainer.batch_size=64"],  # passes of a few batches, without the short last one
        ["trainer.accumulate=3", "strategy=l2", "strategy.towards=previous"],
        ["model=cnn", "model.widths=[4,8]", "model.norm_stats=adapt", "stream.scenario=class", "stream.augment=[crop]"],
        ["trainer.first_task={epochs: 2, optimizer: {lr: 0.002}, scheduler: {milestones: [0.3]}}", "scheduler=step"],
        ["strategy=ewc", "strategy.accumulation=sum", "strategy.strength=10", "stream.scenario=domain"],
        ["fisher.representation=kfac", "strategy=ewc", "strategy.strength=10"],
        ["strategy.mode=oversampled", "strategy=er", "strategy.store=task", "memory=herding", "memory.size=40"],
        ["strategy.merge=false", "strategy=lora"],
        ["trainer.optimizer_state=keep", "strategy=lora", "optimizer=adam"],
        ["trainer.precision=bf16", "strategy=agem", "memory.size=40"],
        ["trainer.clip_norm=0.1", "trainer.accumulate=3", "strategy=derpp", "memory.size=40"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_order_of_the_batches_and_every_draw_go_on_where_they_were(budget, tmp_path):
    overrides = budget if any("strategy=" in word for word in budget) else [*budget, "strategy=finetune"]
    make = partial(experiment, tmp_path, *overrides, *OFTEN)
    whole = carry_out(make(), "whole")
    for steps in (5, 16, 11):
        with pytest.raises(PowerCutError):
            carry_out(cut(make(), steps=steps), "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


@pytest.mark.parametrize("which", ["the pretrained model's", "a task's"])
def test_a_fisher_that_was_half_made_is_made_again(which, tmp_path, pretrained):
    make = partial(experiment, tmp_path, *overrides_for("ewc", pretrained), "strategy.anchor=both", *OFTEN)
    whole = carry_out(make(), "whole")
    stopped = make()
    estimate = stopped.strategy._estimated

    def half(fisher, model, examples):
        if (which == "a task's") == (model is stopped.strategy.model):
            fisher(model, examples[: len(examples) // 2])
            raise PowerCutError
        return estimate(fisher, model, examples)

    stopped.strategy._estimated = half
    with pytest.raises(PowerCutError):
        carry_out(stopped, "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


@pytest.mark.parametrize("left", ["a draft", "a draft and no last", "no last"])
def test_a_process_that_died_while_it_saved_leaves_what_was_saved_before(left, tmp_path):
    make = partial(experiment, tmp_path, "strategy=finetune", *OFTEN)
    whole = carry_out(make(), "whole")
    with pytest.raises(PowerCutError):
        carry_out(cut(make(), steps=14), "stopped")
    place = tmp_path / "stopped" / "checkpoint"
    if "draft" in left:
        (place / ".last.pt.12345").write_bytes((place / "last.pt").read_bytes()[:1000])
    if "no last" in left:
        (place / "last.pt").unlink()
    assert_equal_runs(whole, carry_out(make(), "stopped"))


def test_how_often_a_run_is_saved_changes_neither_its_numbers_nor_its_name(tmp_path):
    runs = []
    for every in ("null", "1"):
        made = experiment(tmp_path, "strategy=ewc", "strategy.strength=10", f"trainer.checkpoint_every={every}")
        runs.append((made.folder, carry_out(made, every)))
    assert runs[0][0] == runs[1][0]
    assert_equal_runs(runs[0][1], runs[1][1])


def test_a_finished_run_keeps_no_checkpoint_unless_asked_to(tmp_path):
    _, path = carry_out(experiment(tmp_path, "strategy=finetune"), "one")
    assert not (path / "checkpoint").exists()
    _, path = carry_out(experiment(tmp_path, "strategy=finetune", "trainer.keep_checkpoint=true"), "two")
    assert (path / "checkpoint" / "last.pt").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("torn", "is damaged"),
        ("flipped", "is damaged"),
        ("old", "is no checkpoint of this version"),
        ("foreign", "belongs to another configuration"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_it_taken(damage, says, tmp_path, caplog):
    overrides = ["strategy=finetune", *OFTEN]
    whole = carry_out(experiment(tmp_path, *overrides), "whole")
    for steps in (5, 12):  # a checkpoint, and another
        with pytest.raises(PowerCutError):
            carry_out(cut(experiment(tmp_path, *overrides), steps=steps), "stopped")
    file = tmp_path / "stopped" / "checkpoint" / "last.pt"
    content = bytearray(file.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "old":
        content = b"cl_runner checkpoint 1" + content
    else:
        with pytest.raises(PowerCutError):
            carry_out(cut(experiment(tmp_path, *overrides, "seed=1"), steps=12), "other")
        content = (tmp_path / "other" / "checkpoint" / "last.pt").read_bytes()
    file.write_bytes(content)
    with caplog.at_level("INFO", logger="cl_runner"):
        resumed = carry_out(experiment(tmp_path, *overrides), "stopped")
    assert f"{file} {says}" in caplog.text
    assert "going on at task" in caplog.text
    assert_equal_runs(whole, resumed)


def test_without_a_checkpoint_that_can_be_read_a_run_begins_anew(tmp_path, caplog):
    whole = carry_out(experiment(tmp_path, "strategy=finetune"), "whole")
    with pytest.raises(PowerCutError):
        carry_out(cut(experiment(tmp_path, "strategy=finetune", *OFTEN[:1]), steps=12), "stopped")
    for file in (tmp_path / "stopped" / "checkpoint").iterdir():
        file.write_bytes(b"nothing")
    resumed = carry_out(experiment(tmp_path, "strategy=finetune"), "stopped")
    assert "starts from the beginning" in caplog.text
    assert_equal_runs(whole, resumed)
