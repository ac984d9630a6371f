import shlex
from pathlib import Path
from typing import Any

import pytest

from cl_runner.trackers.names import command_of, overrides_of, parts, percent, run_name


def config(**changes: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "strategy": {"_target_": "cl_runner.strategies.EWC", "strength": 100.0},
        "stream": {"_target_": "cl_runner.streams.split.Split", "name": "cifar100"},
        "model": {"_target_": "cl_runner.models.ResNet18"},
        **changes,
    }


def test_a_run_is_named_by_its_parts() -> None:
    assert parts(config()) == ("ewc", "split_cifar100", "resnet18")


def test_a_model_out_of_many_goes_by_its_own_name() -> None:
    model = {"_target_": "cl_runner.models.Timm", "name": "vit_tiny_patch16_224"}
    assert parts(config(model=model))[2] == "vit_tiny_patch16_224"


def test_a_component_of_the_users_own_has_a_name_too() -> None:
    stream = {"_target_": "my_package.streams.Radio"}
    assert parts(config(stream=stream))[1] == "radio"


def test_a_name_says_what_was_set_by_hand_and_the_seed_last() -> None:
    overrides = ["strategy=ewc", "++strategy.strength=100", "seed=3", "stream=split_cifar100", "optimizer.lr=0.01"]
    assert run_name(config(), overrides) == "ewc strength=100 lr=0.01 · split_cifar100 · s3"


def test_a_name_says_which_choices_were_made() -> None:
    overrides = ["strategy=online_ewc", "fisher=exact", "model=mlp"]
    assert run_name(config(), overrides) == "online_ewc fisher=exact model=mlp · split_cifar100 · s3"


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "tracker=wandb",
        "tracker.mode=offline",
        "hydra/launcher=local",
        "trainer.log_every=2",
    ],
)
def test_a_name_leaves_out_how_a_run_is_carried_out(override: str) -> None:
    assert run_name(config(), [override]) == "ewc · split_cifar100 · s3"


def test_a_name_says_what_counts_of_what_was_set() -> None:
    overrides = [
        "trainer.epochs=3",
        "model=mlp",
        "++trainer.epochs=4",
        "+trainer.first_task.epochs=9",
        "~trainer.clip_norm",
    ]
    named = "ewc model=mlp trainer.epochs=4 first_task.epochs=9 ~clip_norm · split_cifar100 · s3"
    assert run_name(config(), overrides) == named
    overrides = ["strategy=combined", "~strategy@strategy.parts.ewc", "+strategy@strategy.parts.si=si"]
    assert run_name(config(), overrides) == "combined ~ewc si=si · split_cifar100 · s3"


def test_what_was_set_is_read_from_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- strategy=ewc\n- seed=1\n")
    assert overrides_of(tmp_path) == ["strategy=ewc", "seed=1"]


@pytest.mark.parametrize("content", [None, "[]\n"])
def test_a_run_that_nothing_was_set_for_has_no_overrides(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "overrides.yaml").write_text(content)
    assert overrides_of(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["strategy=ewc", "seed=1"], "cl-runner strategy=ewc seed=1"),
        (["strategy=ewc", "rerun=true", "seed=1"], "cl-runner strategy=ewc seed=1"),
        (["--multirun", "strategy=ewc,lwf", "seed=1,2"], "cl-runner strategy=lwf seed=2"),
        (["--multirun", "--config-dir", "my conf", "seed=1,2"], "cl-runner --config-dir 'my conf' strategy=lwf seed=2"),
    ],
)
def test_the_command_is_that_of_the_run_alone(words, command, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- rerun=True\n- strategy=lwf\n- seed=2\n")
    assert command_of(tmp_path, shlex.join(["cl-runner", *words])) == command


def test_a_run_that_no_command_asked_for_has_none(tmp_path: Path) -> None:
    assert command_of(tmp_path, "") == ""


def test_a_share_is_written_with_a_true_minus_and_never_as_minus_zero() -> None:
    shown = [percent(share) for share in (0.98765, -0.012, -0.0004, None)]
    assert shown == ["98.8", "−1.2", "0.0", "–"]
    assert percent(0.98765, 0) == "99"
