"""What is specific to squares of batches' mean gradients."""

import copy
from dataclasses import replace

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.fisher.batched import Batched
from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.estimators import Empirical, Reversed
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples

from .cases import distance, examples, model


def test_batched_shrinks_with_the_batch_as_it_is_defined_to() -> None:
    subject, data = model(), examples(64)
    traces = [float(Batched(batch_size=size)(subject, data).trace()) for size in (1, 8, 64)]
    assert traces[0] == pytest.approx(float(Empirical()(subject, data).trace()))
    assert traces[0] > 2 * traces[1] > 4 * traces[2]


def test_a_short_last_batch_counts_as_much_as_any_other_in_batched() -> None:
    subject, data = model(), examples(5)
    parts = [Batched(batch_size=4)(subject, part) for part in (data[:4], data[4:])]
    assert distance(Batched(batch_size=4)(subject, data), parts[0].plus(parts[1]).scaled(0.5)) < 1e-10


def by_autograd(subject: Model, batches: list[Examples], train_mode: bool, augment: bool) -> Diagonal:
    """The same computed on a copy, whose statistics may change."""
    subject = copy.deepcopy(subject).train(train_mode)
    subject.preprocess.train(augment)
    total: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(Batched().seed_for(examples()))
        for batch in batches:
            subject.zero_grad()
            logits = subject.restrict(subject(batch.images).logits, batch.task_ids)
            torch.nn.functional.cross_entropy(logits, batch.labels).backward()
            for name, values in subject.named_parameters():
                total[name] = total.get(name, 0) + values.grad**2 / len(batches)
    return Diagonal(total)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("backbone", ["mlp", "batch norm"])
def test_train_mode_and_augmentation_are_as_in_a_training_step(backbone: str, train_mode: bool, augment: bool) -> None:
    subject, data = model(backbone), examples(11)
    found = Batched(batch_size=4, train_mode=train_mode, augment=augment)(subject, data)
    assert distance(found, by_autograd(subject, [data[:4], data[4:8], data[8:]], train_mode, augment)) < 1e-10


def test_reversed_batches_of_one_are_the_reversed_estimator() -> None:
    subject, data = model(), examples(12)
    found = Batched(batch_size=1, reverse=True)(subject, data)
    assert distance(found, Reversed()(subject, data)) < 1e-10
    assert distance(Batched(batch_size=4, reverse=True)(subject, data), found) > 0.01


@pytest.mark.parametrize("switch", ["train_mode", "augment"])
def test_a_switch_changes_the_result(switch: str) -> None:
    subject = model("batch norm" if switch == "train_mode" else "linear")
    assert distance(Batched(**{switch: True})(subject, examples()), Batched()(subject, examples())) > 0.01


@pytest.mark.parametrize("switch", ["train_mode", "augment"])
def test_chance_follows_the_seed_and_leaves_the_global_generator_alone(switch: str) -> None:
    subject, before = model(), torch.get_rng_state()
    first, same, other = (Batched(seed=seed, **{switch: True})(subject, examples()) for seed in (0, 0, 1))
    assert distance(first, same) == 0
    assert distance(first, other) > 1e-3
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_and_modes_are_as_they_were_after_train_mode() -> None:
    subject = model("batch norm").eval()
    before = copy.deepcopy(subject.state_dict())
    Batched(train_mode=True, augment=True, batch_size=4)(subject, examples())
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert not any(module.training for module in subject.modules())


def test_layers_that_the_model_holds_still_stay_so_in_train_mode() -> None:
    subject = model("batch norm")
    subject.keep_in_eval([subject.backbone[1]])
    assert distance(Batched(train_mode=True)(subject, examples()), Batched()(subject, examples())) < 1e-10


def test_a_last_image_alone_joins_the_batch_before_it_in_train_mode() -> None:
    subject, data = model("batch norm"), examples(9)
    found = Batched(batch_size=4, train_mode=True)(subject, data)
    assert distance(found, by_autograd(subject, [data[:4], data[4:]], True, False)) < 1e-10
    five = Batched(batch_size=4, train_mode=True)(subject, data[:5])
    assert distance(five, by_autograd(subject, [data[:5]], True, False)) < 1e-10


def test_no_value_is_larger_than_the_clip() -> None:
    subject = model()
    plain, clipped = (Batched(clip=clip)(subject, examples()) for clip in (None, 1e-3))
    for name, values in plain.values.items():
        assert torch.equal(clipped.values[name], values.clamp(max=1e-3))
    assert max(float(values.max()) for values in plain.values.values()) > 1e-3


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("fisher.batch_size", {"train_mode": True, "batch_size": 1}),
        ("fisher.num_samples", {"train_mode": True, "num_samples": 1}),
        ("fisher.precision", {"precision": "bf16"}),
    ],
)
def test_what_cannot_work_is_refused(field: str, settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"{field}: expected .*, got") as refused:
        Batched(**settings)
    assert refused.value.field == field


def test_the_pretrained_model_is_estimated_without_the_switches() -> None:
    stand_in = Batched(train_mode=True, augment=True, clip=1e-4, pretrained_samples=7).for_pretrained()
    assert type(stand_in).__name__ == "Probe"
    assert replace(stand_in, num_samples=None).pretrained_samples == 7
