"""Tests of all memories, and of what each of them keeps."""

import io

import pytest
import torch

from cl_runner.memory import ClassBalanced, Herding, Reservoir, herding
from cl_runner.memory.herding import herd
from cl_runner.streams.base import Examples, concatenate

MEMORIES = {
    "reservoir": lambda: Reservoir(size=12),
    "class_balanced": lambda: ClassBalanced(size=12),
    "per_class": lambda: ClassBalanced(size=4, per="class"),
    "per_task": lambda: ClassBalanced(size=4, per="task"),
    "ring": lambda: ClassBalanced(size=12, keep="newest", share="task"),
    "herding": lambda: Herding(size=12),
    "herding_per_class": lambda: Herding(size=4, per="class"),
}


def rows(labels, task=0, first=0):
    """Rows whose images and stored logits encode their number, counting from `first`."""
    numbers = torch.arange(first, first + len(labels))
    images = torch.stack([numbers % 256, numbers // 256], 1).to(torch.uint8).view(-1, 2, 1, 1)
    logits = torch.stack([numbers, -numbers], 1).float()
    return Examples(images, torch.tensor(labels), torch.full((len(labels),), task), {"logits": logits})


def number(examples):
    pixels = examples.images.flatten(1).long()
    return pixels[:, 0] + 256 * pixels[:, 1]


def features(images):
    return torch.stack([images[:, 0, 0, 0].float().sin(), images[:, 0, 0, 0].float().cos()], 1)


def filled(memory, tasks=3):
    """Two classes per task, with 20 rows each."""
    for task in range(tasks):
        memory.add_task(rows([2 * task, 2 * task + 1] * 20, task, 40 * task), features)
    return memory


def offer(memory, labels, batch=7, first=0):
    for start in range(0, len(labels), batch):
        memory.add(rows(labels[start : start + batch], first=first + start))


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_every_row_stays_what_it_was(make):
    torch.manual_seed(0)
    kept = filled(make()).examples
    assert kept.images.dtype == torch.uint8
    assert len(number(kept).unique()) == len(kept)
    everything = concatenate([rows([2 * task, 2 * task + 1] * 20, task, 40 * task) for task in range(3)])
    assert torch.equal(kept.labels, everything.labels[number(kept)])
    assert torch.equal(kept.task_ids, everything.task_ids[number(kept)])
    assert torch.equal(kept.extras["logits"], everything.extras["logits"][number(kept)])


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_a_memory_that_has_been_saved_goes_on_as_if_it_had_not(make):
    torch.manual_seed(0)
    one, other = filled(make(), tasks=2), make()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert one.examples.images.dtype == torch.uint8
        for name in ("images", "labels", "task_ids"):
            assert torch.equal(getattr(one.examples, name), getattr(other.examples, name))
        assert torch.equal(one.examples.extras["logits"], other.examples.extras["logits"])
        for memory in (one, other):
            torch.manual_seed(1)
            memory.add_task(rows([4, 5, 0] * 20, task=2, first=80), features)
    torch.manual_seed(2)
    first = number(one.sample(5))
    torch.manual_seed(2)
    assert torch.equal(first, number(other.sample(5)))


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_an_empty_memory_can_be_saved_and_brought_back_over_a_full_one(make):
    memory = filled(make())
    memory.load_state_dict(make().state_dict())
    assert len(memory) == 0
    with pytest.raises(LookupError, match="empty"):
        memory.sample(1)


def test_a_saved_state_does_not_change_with_the_memory():
    memory = filled(Reservoir(size=12), tasks=1)
    state = memory.state_dict()
    before = state["images"].clone(), state["ranks"].clone()
    torch.manual_seed(0)
    offer(memory, [9] * 100, first=100)
    assert torch.equal(before[0], state["images"])
    assert torch.equal(before[1], state["ranks"])
    assert len(state["images"].untyped_storage()) == 2 * 12  # bytes: the rows, not the room around them


def test_a_sample_has_no_row_twice_and_is_uniform():
    torch.manual_seed(0)
    memory = filled(Reservoir(size=12))
    assert number(memory.sample(12)).sort().values.equal(number(memory.examples).sort().values)
    assert len(memory.sample(50)) == 12
    drawn = torch.stack([(number(memory.sample(3))[:, None] == number(memory.examples)).sum(0) for _ in range(2000)])
    assert drawn.max() == 1
    share = drawn.double().mean(0)  # each row: 2000 draws with probability 1/4
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("batch", [4, 40])
def test_the_reservoir_is_uniform_over_all_that_streamed_by(batch):
    torch.manual_seed(0)
    trials, size, streamed = 400, 6, 40
    held = torch.zeros(streamed)
    for _ in range(trials):
        memory = Reservoir(size=size)
        offer(memory, [0] * streamed, batch)
        held[number(memory.examples)] += 1
    expected, p = trials * size / streamed, size / streamed
    chi_square = ((held - expected) ** 2 / (expected * (1 - p))).sum() * (streamed - 1) / streamed
    assert chi_square < 72.1  # 39 degrees of freedom: exceeded by one uniform sampler in a thousand
    assert len(memory) == size


def test_the_reservoir_fills_before_it_replaces():
    memory = Reservoir(size=12)
    offer(memory, [0] * 12)
    assert number(memory.examples).tolist() == list(range(12))


@pytest.mark.parametrize("keep", ["random", "newest"])
def test_a_balanced_memory_stays_full_and_balanced_whatever_streams_by(keep):
    torch.manual_seed(0)
    memory = ClassBalanced(size=24, keep=keep)
    for task, label in enumerate([0, 1, 2, 3, 4]):
        offer(memory, [label] * (200 if task % 2 else 40))
        counts = torch.bincount(memory.examples.labels)
        assert counts.sum() == 24
        assert counts.max() - counts.min() <= 1
        assert len(counts) == task + 1


def test_room_that_a_small_class_leaves_goes_to_the_others():
    memory = ClassBalanced(size=12)
    offer(memory, [0] * 2 + [1] * 50 + [2] * 50)
    assert torch.bincount(memory.examples.labels).tolist() == [2, 5, 5]


@pytest.mark.parametrize(("per", "group"), [("class", "labels"), ("task", "task_ids")])
def test_a_size_per_group_is_each_groups_own(per, group):
    memory = filled(ClassBalanced(size=4, per=per))
    counts = torch.bincount(getattr(memory.examples, group))
    assert counts.tolist() == [4] * (6 if per == "class" else 3)


def test_a_size_in_all_can_be_shared_among_tasks():
    memory = ClassBalanced(size=12, share="task")
    memory.add(rows([0] * 30, task=0))
    memory.add(rows([1, 2, 3, 4, 5] * 6, task=1, first=30))
    assert torch.bincount(memory.examples.task_ids).tolist() == [6, 6]


@pytest.mark.parametrize("settings", [{"size": 3, "per": "task_class"}, {"size": 12, "share": "task_class"}])
def test_classes_that_come_back_can_have_room_in_each_task(settings):
    memory = ClassBalanced(**settings)
    for task in range(2):
        memory.add(rows([0] * 30 + [1] * 10, task, 40 * task))
    cells = torch.stack([memory.examples.task_ids, memory.examples.labels], 1)
    assert cells.unique(dim=0, return_counts=True)[1].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("size", "quota"), [(4, 1), (6, 2), (16, 4)])
def test_within_a_class_the_sample_is_uniform_also_after_others_came(size, quota):
    torch.manual_seed(0)
    held = torch.zeros(40)
    for _ in range(500):
        memory = ClassBalanced(size=size)
        for label in range(4):
            offer(memory, [label] * 40, batch=20, first=40 * label)
        ours = number(memory.examples)[memory.examples.labels == 0]
        assert len(ours) == quota
        held[ours] += 1
    expected, p = 500 * quota / 40, quota / 40
    chi_square = ((held - expected) ** 2 / (expected * (1 - p))).sum() * 39 / 40
    assert chi_square < 72.1  # 39 degrees of freedom, one in a thousand


def test_a_ring_holds_the_newest_of_each_class():
    memory = ClassBalanced(size=6, keep="newest")
    offer(memory, [0] * 10 + [1] * 10 + [0])
    ours = number(memory.examples)
    assert sorted(ours[memory.examples.labels == 0].tolist()) == [8, 9, 20]
    assert sorted(ours[memory.examples.labels == 1].tolist()) == [17, 18, 19]


def test_herding_picks_what_brings_the_mean_nearest():
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    chosen: list[int] = []
    for _ in range(9):
        rest = [row for row in range(9) if row not in chosen]
        gaps = [(values.mean(0) - values[[*chosen, row]].mean(0)).norm().item() for row in rest]
        chosen.append(rest[gaps.index(min(gaps))])
    assert herd(values, 9).tolist() == chosen
    assert herd(values, 4).tolist() == chosen[:4]


def test_herding_may_aim_at_the_mean_brought_to_length_one():
    values = torch.nn.functional.normalize(torch.rand(9, 4, generator=torch.Generator().manual_seed(0)))
    aim = values.mean(0) / values.mean(0).norm()
    chosen: list[int] = []
    for _ in range(9):
        rest = [row for row in range(9) if row not in chosen]
        gaps = [(aim - values[[*chosen, row]].mean(0)).norm().item() for row in rest]
        chosen.append(rest[gaps.index(min(gaps))])
    assert herd(values, 9, normalize_mean=True).tolist() == chosen
    assert herd(values, 9).tolist() != chosen


def test_herded_rows_are_the_first_picks_of_their_class_however_many_classes_came_later():
    def encode(images):
        return features(images) + 1

    memory = Herding(size=12)
    for task in range(3):
        memory.add_task(rows([2 * task, 2 * task + 1] * 20, task, 40 * task), encode)
    for task in range(3):
        examples = rows([2 * task, 2 * task + 1] * 20, task, 40 * task)
        for label in (2 * task, 2 * task + 1):
            ours = examples[examples.labels == label]
            picks = herd(torch.nn.functional.normalize(encode(ours.images)), 2)
            kept = number(memory.examples)[memory.examples.labels == label]
            assert sorted(kept.tolist()) == sorted(number(ours)[picks].tolist())


@pytest.mark.parametrize("per", ["all", "class", "task", "task_class"])
@pytest.mark.parametrize("share", ["class", "task", "task_class"])
def test_herding_picks_no_more_than_can_stay_and_keeps_what_it_would_otherwise(per, share, monkeypatch):
    def filled(room=None):
        memory, counts = Herding(size=7, per=per, share=share), []
        monkeypatch.setattr(herding, "herd", lambda *given: counts.append(given[1]) or herd(*given))
        if room:
            monkeypatch.setattr(memory, "_room", room)
        for task, labels in enumerate(([0, 1, 1] * 9, [1, 2, 3] * 9, [0, 3, 4] * 9)):
            memory.add_task(rows(labels, task, 27 * task), features)
        return sorted(number(memory.examples).tolist()), counts

    kept, counts = filled()
    assert kept == filled(room=lambda examples, rows_of: [len(rows) for rows in rows_of])[0]
    assert max(counts) <= 8


def test_a_class_that_comes_back_is_herded_in_each_task_and_shares_its_room():
    memory = Herding(size=8, per="class")
    for task in range(2):
        memory.add_task(rows([0, 1] * 20, task, 40 * task), features)
    cells = torch.stack([memory.examples.task_ids, memory.examples.labels], 1)
    assert cells.unique(dim=0, return_counts=True)[1].tolist() == [4, 4, 4, 4]


def test_herding_takes_no_single_batches():
    with pytest.raises(TypeError, match="add_task"):
        Herding().add(rows([0, 1]))


def test_rows_with_other_extras_are_refused():
    memory = Reservoir(size=4)
    memory.add(rows([0, 1]))
    plain = rows([0, 1])
    with pytest.raises(ValueError, match="extras \\['logits'\\], got \\[\\]"):
        memory.add(Examples(plain.images, plain.labels, plain.task_ids))
