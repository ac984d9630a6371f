"""Seeds, and the states of all random number generators that belong to no component of a run."""

import random
from hashlib import blake2b
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every global generator (PyTorch's on every device, numpy's and Python's) with a seed derived from `seed`, so
    that they differ from generators seeded with `seed` itself (a task's order of batches)."""
    seed = derive_seed(seed, "global")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for `purpose`: generators that start from `seed` itself draw other numbers."""
    return int.from_bytes(blake2b(f"{seed} {purpose}".encode(), digest_size=7).digest())


def task_seed(seed: int, index: int) -> int:
    """Another seed for every task; a prime apart, as the seeds of a sweep are not."""
    return seed * 1_000_003 + index


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global generators are, in plain values and tensors on the CPU; those on `device` among them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray), "the legacy form is a tuple: name, keys, ..."
    return {
        "torch": torch.get_rng_state(),
        "device": device.type,
        "on_device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_which(device)),
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Take every global generator to where it was; the device's own only if it is of the kind that it was saved on."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == state["device"] != "cpu":
        torch.get_device_module(device).set_rng_state(state["on_device"].cpu(), *_which(device))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What the generator of a device is asked for by, where there can be several of its kind."""
    return (device,) if device.type == "cuda" else ()
