"""The state of a run between two tasks: saved in one motion, and refused where it is not this run's."""

import io
import logging
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl_runner.folder import write_atomically
from cl_runner.strategies.base import Strategy

log = logging.getLogger("cl_runner")

MAGIC = b"cl_runner checkpoint 1\n"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `folder`/checkpoint/last.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    (folder / "checkpoint").mkdir(exist_ok=True)
    write_atomically(folder / "checkpoint" / "last.pt", MAGIC + zlib.crc32(body).to_bytes(4, "big") + body)


def load(folder: Path, config_hash: str, device: torch.device) -> dict[str, Any] | None:
    """The last state saved in `folder`, or None where there is none that this configuration can go on from."""
    path = folder / "checkpoint" / "last.pt"
    if not path.exists():
        return None
    content = path.read_bytes()
    start = len(MAGIC) + 4
    if not content.startswith(MAGIC) or zlib.crc32(content[start:]).to_bytes(4, "big") != content[len(MAGIC) : start]:
        log.warning("%s is damaged: starting from the beginning", path)
        return None
    state = torch.load(io.BytesIO(content[start:]), map_location=device, weights_only=True)
    if state["config_hash"] != config_hash:
        log.warning("%s belongs to another configuration: starting from the beginning", path)
        return None
    return state


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """What `strategy.saved` names; a module by its state dict."""
    values = {name: getattr(strategy, name) for name in strategy.saved}
    return {name: value.state_dict() if isinstance(value, nn.Module) else value for name, value in values.items()}


def restore_strategy(strategy: Strategy, state: dict[str, Any]) -> None:
    for name, value in state.items():
        current = getattr(strategy, name)
        if isinstance(current, nn.Module):
            current.load_state_dict(value)
        else:
            setattr(strategy, name, value)
