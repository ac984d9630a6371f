import random

import numpy as np
import pytest
import torch

from cl_runner.randomness import derive_seed, random_state, restore_random_state, seed_all


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_all_generators_go_back_to_where_they_were():
    seed_all(3)
    state = random_state(torch.device("cpu"))
    first = drawn()
    assert drawn() != first
    restore_random_state(state, torch.device("cpu"))
    assert drawn() == first


def test_the_global_generator_repeats_no_generator_that_starts_from_the_seed_itself():
    seed_all(3)
    assert torch.rand(3).tolist() != torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()


def test_a_seed_is_another_for_every_purpose_and_for_every_seed():
    seeds = {derive_seed(seed, purpose) for seed in range(100) for purpose in ("backbone", "head")}
    assert len(seeds) == 200
    assert derive_seed(3, "backbone") == derive_seed(3, "backbone")
    for seed in seeds:
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "given"), [("cuda:1", (torch.device("cuda:1"),)), ("mps", ())])
def test_the_generator_that_is_saved_is_that_of_the_device(name, given, monkeypatch):
    asked = []

    class Module:
        @staticmethod
        def get_rng_state(*words):
            asked.append(words)
            return torch.zeros(1, dtype=torch.uint8)

        @staticmethod
        def set_rng_state(state, *words):
            asked.append(words)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    restore_random_state(random_state(torch.device(name)), torch.device(name))
    assert asked == [given, given]
    other = "mps" if name.startswith("cuda") else "cuda"
    restore_random_state(random_state(torch.device(name)), torch.device(other))
    assert asked == [given, given, given]  # what one kind of device has saved means nothing to another
