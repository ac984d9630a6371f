import errno
import os
import resource
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cl_runner import checkpoint
from cl_runner.checkpoint import restore_model
from cl_runner.folder import CannotWriteError
from cl_runner.progress import Pace
from cl_runner.strategies import Finetune
from tests.toys import toy_model, toy_stream

CPU = torch.device("cpu")


def save(folder, number):
    checkpoint.save(folder, "hash", CPU, {"number": number, "values": torch.full((1000,), number)})


def number(folder):
    state = checkpoint.load(folder, "hash", CPU)
    return state and state["number"]


def test_the_last_checkpoint_is_taken_and_the_one_before_it_kept(tmp_path):
    assert number(tmp_path) is None
    for each in (1, 2, 3):
        save(tmp_path, each)
    assert number(tmp_path) == 3
    (tmp_path / "checkpoint" / "last.pt").unlink()
    assert number(tmp_path) == 2
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["previous.pt"]


@pytest.mark.parametrize("place", [0, 10, 30, 100, 1000, -1])
def test_a_single_flipped_bit_is_seen(place, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "checkpoint" / "last.pt"
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    assert number(tmp_path) == 1


@pytest.mark.parametrize("length", [0, 5, 60, 2000])
def test_a_torn_file_is_seen(length, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "checkpoint" / "last.pt"
    file.write_bytes(file.read_bytes()[:length])
    assert number(tmp_path) == 1


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_full_disk_leaves_what_was_saved_before(moment, tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    places = {"fsync": [(os, "fsync")], "rename": [(os, "rename"), (os, "replace")]}
    with monkeypatch.context() as patch:
        for place in places[moment]:
            patch.setattr(*place, full)
        with pytest.raises(CannotWriteError, match="last.pt: No space left on device"):
            save(tmp_path, 3)
    assert number(tmp_path) == 2
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"last.pt", "previous.pt"}


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_named(tmp_path):
    """PyTorch itself would say `unexpected pos 323584 vs 323472`."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(CannotWriteError, match=f"^cannot write {tmp_path}/checkpoint/last.pt: File too large$"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert number(tmp_path) == 1


@dataclass
class Unknown:
    """A class that is not among torch's safe globals."""

    value: int = 1


def test_what_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"cannot hold tests\.test_checkpoint\.Unknown"):
        checkpoint.save(tmp_path, "hash", CPU, {"strategy": Unknown()})
    assert number(tmp_path) == 1


class Keeping(Finetune):
    """A strategy with one attribute of every kind that can be saved."""

    saved = ("module", "memory", "generator", "number", "tensors")

    def setup(self, model, stream):
        super().setup(model, stream)
        self.module, self.memory = nn.Linear(2, 2), Sums()
        self.generator = torch.Generator()
        self.number, self.tensors = 0, {}


class Sums:
    """An object with a state_dict, as a memory has."""

    def __init__(self):
        self.total = 0

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def test_a_strategy_gets_back_what_it_names(tmp_path):
    stream = toy_stream()
    one, other = Keeping(), Keeping()
    for strategy in (one, other):
        strategy.setup(toy_model(stream), stream)
    one.memory.total, one.number, one.tensors = 7, 3, {"a": torch.ones(2)}
    one.generator.manual_seed(5)
    torch.rand(3, generator=one.generator)
    checkpoint.save(tmp_path, "hash", CPU, one.state_dict())
    other.load_state_dict(checkpoint.load(tmp_path, "hash", CPU))
    assert (other.memory.total, other.number) == (7, 3)
    assert isinstance(other.memory, Sums)
    assert torch.equal(other.tensors["a"], torch.ones(2))
    assert torch.equal(other.module.weight, one.module.weight)
    assert torch.equal(torch.rand(3, generator=other.generator), torch.rand(3, generator=one.generator))


def test_a_model_gets_back_what_learns_in_it_and_its_modules_modes():
    one, other = (toy_model(toy_stream(), norm=True, seed=seed) for seed in (0, 1))
    one.backbone[1].requires_grad_(False)
    one.train()
    one.backbone[2].eval()
    other.eval()
    restore_model(other, checkpoint.model_state(one))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in one.parameters()]
    assert [m.training for m in other.modules()] == [m.training for m in one.modules()]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_is_saved_after_so_many_steps_or_so_much_time_or_at_once_when_told():
    pace = Pace(every=10)
    assert pace.due == 10
    pace.saved(steps=13)
    assert pace.due == 23
    pace.now()
    assert pace.due == 0
    never = Pace()
    never.look_at_the_clock()
    assert never.due == float("inf")
    timed = Pace(seconds=0.0)
    timed.look_at_the_clock()
    assert timed.due == 0
