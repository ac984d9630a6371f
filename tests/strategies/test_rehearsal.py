"""Tests of all methods with a memory."""

import io

import pytest
import torch

from cl_runner.errors import ConfigError
from cl_runner.evaluate import accuracies
from cl_runner.memory import ClassBalanced, Herding, Reservoir
from cl_runner.models.cnn import CNN
from cl_runner.strategies import AGEM, DER, ER, ERACE, GEM, LUCIR, MIR, BiC, DERpp, Finetune, GDumb, ICaRL
from cl_runner.strategies.rehearsal import weighted
from cl_runner.streams.base import Scenario, concatenate
from cl_runner.streams.split import Split
from tests.toys import learn, toy_model, toy_stream, toy_training

METHODS = {
    "er": lambda: ER(memory=Reservoir(size=30)),
    "er_weighted": lambda: ER(memory=ClassBalanced(size=8, per="class"), mode="weighted", store="task"),
    "er_oversampled": lambda: ER(memory=Herding(size=30), mode="oversampled", store="task"),
    "der": lambda: DER(memory=Reservoir(size=30), alpha=1.0),
    "derpp": lambda: DERpp(memory=Reservoir(size=30)),
    "agem": lambda: AGEM(memory=ClassBalanced(size=30, share="task")),
    "gem": lambda: GEM(memory=ClassBalanced(size=30, keep="newest", share="task")),
    "gdumb": lambda: GDumb(memory=ClassBalanced(size=30)),
    "er_ace": lambda: ERACE(memory=Reservoir(size=30)),
    "mir": lambda: MIR(memory=Reservoir(size=30)),
}
TAUGHT = {
    "icarl": lambda: ICaRL(memory=Herding(size=4, per="class")),
    "bic": lambda: BiC(memory=Herding(size=4, per="class")),
    "lucir": lambda: LUCIR(memory=Herding(size=4, per="class")),
}
REPLAYING = {name: METHODS[name] for name in ("er", "er_weighted", "der", "derpp", "er_ace", "mir")}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
each_replaying = pytest.mark.parametrize("make", REPLAYING.values(), ids=REPLAYING)


def in_second_task(strategy, stream, model, **settings):
    """The training at the beginning of the second task."""
    learn(strategy, stream, model, tasks=1, **settings)
    training, _ = toy_training(strategy, stream, model, **settings)
    model.reveal(stream.tasks[1])
    strategy.before_task(stream.tasks[1])
    training.optimizer = training._new_optimizer({})
    training.parameters = list(model.parameters())
    training.scheduler = training.make_scheduler(optimizer=training.optimizer, steps=10)
    return training


def accuracy_told_apart_among_all(strategy):
    """Mean accuracy on earlier tasks, and accuracy on the last, after all of them; chance is one sixth."""
    stream = toy_stream("class", size=32)
    learn(strategy, stream, toy_model(stream), epochs=10)
    *earlier, last = accuracies(strategy, 3, 32)[Scenario.CLASS]
    return sum(earlier) / len(earlier), last


@pytest.mark.parametrize(
    ("name", "least"),  # about three quarters of what each remembers here
    [
        ("er", 0.35),
        ("er_weighted", 0.75),
        ("er_oversampled", 0.65),
        ("der", 0.18),
        ("derpp", 0.3),
        ("gem", 0.75),
        ("gdumb", 0.25),
        ("er_ace", 0.6),
        ("mir", 0.4),
        ("agem", 0.1),  # below chance, where fine-tuning ends at none
    ],
)
def test_it_remembers_what_fine_tuning_forgets(name, least):
    earlier, last = accuracy_told_apart_among_all(METHODS[name]())
    assert earlier >= least
    assert last >= 0.3


def test_fine_tuning_forgets():
    assert accuracy_told_apart_among_all(Finetune()) == (0, 1)


@each_method
def test_parts_and_statistics_that_are_frozen_stay_so(make):
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    model.backbone[1].requires_grad_(False)
    model.keep_in_eval([model.backbone[2]])
    before = {name: value.clone() for name, value in model.backbone.state_dict().items() if name[0] != "2"}
    statistics = model.backbone[2].running_mean.clone()
    learn(make(), stream, model)
    assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in before.items())
    assert torch.equal(statistics, model.backbone[2].running_mean)


@each_replaying
def test_replayed_rows_come_after_the_fresh_ones(make):
    stream = toy_stream()
    strategy = make()
    in_second_task(strategy, stream, toy_model(stream))
    fresh = stream.tasks[1].train[:8]
    batch = strategy.before_batch(fresh)
    assert torch.equal(batch.images[:8], fresh.images)
    assert torch.equal(batch.labels[:8], fresh.labels)
    assert len(batch) > 8
    assert (batch.task_ids[8:] == 0).all()
    held = strategy.memory.examples
    for image in batch.images[8:]:
        assert (held.images == image).flatten(1).all(1).any()


@each_replaying
def test_as_many_rows_are_replayed_as_are_asked_for(make):
    stream = toy_stream()
    strategy = make()
    strategy.replay_batch_size = 3
    in_second_task(strategy, stream, toy_model(stream))
    draws = 2 if isinstance(strategy, DERpp) else 1
    assert len(strategy.before_batch(stream.tasks[1].train[:8])) == 8 + 3 * draws


@pytest.mark.parametrize("kind", [ER, DER, DERpp, ERACE, MIR])
def test_the_memory_is_offered_every_fresh_row_and_no_replayed_one(kind):
    stream = toy_stream()
    strategy = kind(memory=Reservoir(size=1000))
    learn(strategy, stream, toy_model(stream), tasks=2, epochs=2)
    held = strategy.memory.examples
    assert torch.bincount(held.task_ids).tolist() == [48, 48]  # 24 rows in 2 epochs
    for task in stream.tasks[:2]:
        twice = task.train.images.repeat(2, 1, 1, 1).flatten(1).sort(0).values
        assert torch.equal(held.images[held.task_ids == task.index].flatten(1).sort(0).values, twice)


@each_method
def test_the_memory_stays_uint8(make):
    stream = toy_stream()
    strategy = make()
    learn(strategy, stream, toy_model(stream), tasks=2)
    assert strategy.memory.examples.images.dtype == torch.uint8


@pytest.mark.parametrize("make", [*METHODS.values(), *TAUGHT.values()], ids=[*METHODS, *TAUGHT])
def test_a_batch_learned_in_pieces_gives_the_gradient_of_the_whole(make):
    found = []
    for accumulate in (1, 3):
        stream = toy_stream("class")
        model, strategy = toy_model(stream), make()
        training = in_second_task(strategy, stream, model)
        training.trainer.accumulate = accumulate
        torch.manual_seed(5)
        batch = stream.tasks[1].train[:8]
        if make in TAUGHT.values():  # exemplars are part of the task's data
            batch = batch[:5] + strategy.memory.examples[:3]
        losses = training.step(batch)
        found.append([losses["total"], *(parameter.grad for parameter in model.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize("norm", [False, True])
@each_method
def test_a_run_that_is_resumed_in_the_middle_of_a_task_equals_an_uninterrupted_one(make, norm):
    stream = toy_stream("class")
    model, strategy = toy_model(stream, norm=norm), make()
    training = in_second_task(strategy, stream, model)
    batches = list(stream.tasks[1].train.batches(6))
    for batch in batches[:2]:
        training.step(batch)
    file = io.BytesIO()
    torch.save([model.state_dict(), strategy.state_dict(), torch.get_rng_state()], file)
    for batch in batches[2:]:
        training.step(batch)
    strategy.after_task(stream.tasks[1])

    other_model, other = toy_model(stream, norm=norm, seed=1), make()
    again, _ = toy_training(other, stream, other_model)
    again.optimizer, again.parameters = again._new_optimizer({}), []
    again.scheduler = again.make_scheduler(optimizer=again.optimizer, steps=10)
    file.seek(0)
    weights, state, random = torch.load(file, weights_only=True)
    other_model.load_state_dict(weights)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    other_model.train()
    for batch in batches[2:]:
        again.step(batch)
    other.after_task(stream.tasks[1])
    assert all(torch.equal(v, other_model.state_dict()[name]) for name, v in model.state_dict().items())
    one, two = strategy.memory.state_dict(), other.memory.state_dict()
    assert torch.equal(one["images"], two["images"])
    assert torch.equal(one["ranks"], two["ranks"])


@pytest.mark.parametrize("make", [ER, DER, lambda memory: AGEM(memory=memory, store="step")])
def test_a_memory_that_chooses_whole_tasks_is_refused_where_batches_are_stored(make):
    with pytest.raises(ConfigError, match=r"strategy\.memory: expected one that takes single batches .*, got Herding"):
        make(memory=Herding())


@pytest.mark.parametrize(
    "make",
    [
        *TAUGHT.values(),
        METHODS["er_oversampled"],
        METHODS["gdumb"],
        lambda: AGEM(memory=Herding(size=9)),
        lambda: GEM(memory=Herding(size=9)),
    ],
    ids=[*TAUGHT, "er_oversampled", "gdumb", "agem", "gem"],
)
def test_a_memory_chooses_by_the_features_that_the_model_has_then(make):
    stream = toy_stream("class")
    model, strategy = toy_model(stream, norm=True), make()
    asked = []

    def add_task(examples, features):
        found, training = features(examples.images), model.training
        expected = model.eval()(examples.images).features.detach()
        model.train(training)
        asked.append(torch.equal(found, expected) and not found.requires_grad)
        kept(examples, features)

    kept, strategy.memory.add_task = strategy.memory.add_task, add_task
    learn(strategy, stream, model)
    assert asked == [True] * 3


def test_weights_make_the_mean_over_rows_the_sum_of_the_parts_means():
    stream = toy_stream()
    parts = [stream.tasks[0].train[:5], stream.tasks[1].train[:12]]
    joined = weighted([(parts[0], {"a": 0.3, "b": 1.0}), (parts[1], {"a": 0.9, "b": 0.0})])
    values = torch.rand(17, generator=torch.Generator().manual_seed(0))
    means = values[:5].mean(), values[5:].mean()
    torch.testing.assert_close((joined.extras["a"] * values).mean(), 0.3 * means[0] + 0.9 * means[1])
    torch.testing.assert_close((joined.extras["b"] * values).mean(), means[0])
    assert torch.equal(joined.images, concatenate(parts).images)


@pytest.mark.parametrize("make", [ICaRL, GDumb, BiC, LUCIR])
@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"size": 5}, "memory.size: 5 rows for 6 classes: not all will have one"),
        ({"size": 6}, None),
        ({"size": 1, "per": "task"}, "memory.size: 1 rows for each task for 2 classes: not all will have one"),
        ({"size": 2, "per": "task"}, None),
        ({"size": 1, "per": "class"}, None),
    ],
)
def test_a_memory_without_a_row_for_each_class_is_warned_of_where_nothing_else_is_known_of_them(
    make, memory, said, caplog
):
    stream = toy_stream("class")
    with caplog.at_level("WARNING", logger="cl_runner"):
        make(memory=ClassBalanced(**memory)).setup(toy_model(stream), stream)
    assert [record.message for record in caplog.records] == ([said] if said else [])


@pytest.mark.parametrize("make", [lambda memory: GEM(memory=memory), ER], ids=["gem", "er"])
@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (ClassBalanced(size=5), "memory.size: 5 rows for 6 classes: not all will have one"),
        (ClassBalanced(size=2, share="task"), "memory.size: 2 rows for 3 tasks: not all will have one"),
        (ClassBalanced(size=3, share="task"), None),
        (
            ClassBalanced(size=5, share="task_class"),
            "memory.size: 5 rows for 6 classes, counted in each task: not all will have one",
        ),
        (ClassBalanced(size=1, per="task"), None),
        (Reservoir(size=1), None),
    ],
)
def test_a_memory_without_a_row_for_each_of_its_groups_is_warned_of(make, memory, said, caplog):
    stream = toy_stream("class")
    with caplog.at_level("WARNING", logger="cl_runner"):
        make(memory=memory).setup(toy_model(stream), stream)
    assert [record.message for record in caplog.records] == ([said] if said else [])


@pytest.mark.parametrize("make", [lambda memory: AGEM(memory=memory), lambda memory: GEM(memory=memory)])
def test_a_single_remembered_row_has_a_gradient_beside_a_normalisation_layer(make):
    stream = toy_stream("class")
    model = toy_model(stream, norm=True)
    learn(make(ClassBalanced(size=1)), stream, model)
    assert model.backbone.training


@pytest.mark.parametrize("method", ["agem", "gem"])
def test_an_edited_gradient_lies_in_memory_as_its_weight_does(method):
    """Fused optimizers iterate over both in memory order: with different strides, gradients reach the wrong weights."""
    stream = Split(name="digits", num_tasks=5, max_per_class=20, scenario="class").load("unused", torch.device("cpu"))
    model = CNN().build(stream)
    assert any(not parameter.is_contiguous() for parameter in model.parameters())
    strategy = METHODS[method]()
    strategy.setup(model, stream)
    model.reveal(stream.tasks[0])
    strategy.after_task(stream.tasks[0])
    batch = strategy.before_batch(stream.tasks[0].train[:8])
    strategy.task_loss(batch, model(batch.images)).neg().backward()  # against the memory's gradient
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    strategy.after_backward()
    learning = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert any(not torch.equal(old, parameter.grad) for old, parameter in zip(before, learning, strict=True))
    assert all(parameter.grad.stride() == parameter.stride() for parameter in learning)
