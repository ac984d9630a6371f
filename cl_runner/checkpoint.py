"""Checkpoints: written atomically, and refused if damaged or if they belong to another run.

Two are kept, the last and the one before it. A file consists of a magic line, the checksum of everything after it, a
line of JSON with the hash and device of the run, and what `torch.save` writes.
"""

import io
import json
import logging
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch.serialization import default_restore_location, get_unsafe_globals_in_checkpoint

from cl_runner.folder import replacing, writing
from cl_runner.models.model import Model

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger("cl_runner")

MAGIC = b"cl_runner checkpoint 4\n"
FOLDER, LAST, PREVIOUS = "checkpoint", "last.pt", "previous.pt"
CHUNK = 1 << 20  # bytes


class UnusableError(Exception):
    """A checkpoint that no run can resume from; the message says why."""


def save(folder: Path, config_hash: str, device: torch.device, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `folder`; the last one becomes the previous.

    Raises CannotWriteError, or TypeError for what could not be loaded again; both files are then left as they were.
    """
    place = folder / FOLDER
    with writing(place):
        place.mkdir(exist_ok=True)
    with replacing(place / LAST, keep=place / PREVIOUS) as file:
        file.write(MAGIC + _checksum(0))
        rest = _Summed(file)
        rest.write(json.dumps({"config_hash": config_hash, "device": device.type}).encode() + b"\n")
        start = file.tell()
        try:
            torch.save(state, cast(IO[bytes], rest))
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise rest.failure or error from None
        file.seek(start)
        _check_readable(file)
        file.seek(len(MAGIC))
        file.write(_checksum(rest.crc))


def load(folder: Path, config_hash: str, device: torch.device) -> dict[str, Any] | None:
    """The last usable state saved in `folder` for this configuration, or None."""
    there = [path for name in (LAST, PREVIOUS) if (path := folder / FOLDER / name).exists()]
    for path in there:
        try:
            return _read(path, config_hash, device)
        except UnusableError as error:
            log.warning("%s %s", path, error)
    if there:
        log.warning("no usable checkpoint is left: a run starts from the beginning")
    return None


def _read(path: Path, config_hash: str, device: torch.device) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.readline(len(MAGIC)) != MAGIC:
            raise UnusableError("is no checkpoint of this version")
        said, crc, start = file.readline(CHUNK), 0, file.tell()
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
        if said != _checksum(crc):
            raise UnusableError("is damaged")
        file.seek(start)
        label = json.loads(file.readline())
        if label["config_hash"] != config_hash:
            raise UnusableError("belongs to another configuration")
        # What an accelerator's run kept on the CPU stays there: memories, and counters that must not wait for a device.
        stays = None if label["device"] == "cpu" else "cpu"

        def place(storage: Any, where: str) -> Any:
            return default_restore_location(storage, where if where == stays else str(device))

        return torch.load(file, map_location=place, weights_only=True)


def _check_readable(file: BinaryIO) -> None:
    """Raise TypeError now for what `torch.load` would refuse when the run resumes: weights_only builds no classes."""
    if unknown := get_unsafe_globals_in_checkpoint(file):
        raise TypeError(
            f"a checkpoint cannot hold {', '.join(sorted(unknown))}: of what a strategy names in `saved`, "
            "torch.serialization.add_safe_globals must let in the classes that are not PyTorch's"
        )


def _checksum(crc: int) -> bytes:
    """The checksum's line, always of the same length."""
    return f"{crc:08x}\n".encode()


class _Summed(io.BufferedIOBase):
    """Writes through to a file and keeps the checksum, so that a large model is never in memory twice."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0
        self.failure: OSError | None = None

    def write(self, content: "ReadableBuffer", /) -> int:
        self.crc = zlib.crc32(content, self.crc)
        try:
            return self.file.write(content)
        except OSError as error:
            self.failure = error
            raise


def model_state(model: Model) -> dict[str, Any]:
    """Weights and buffers, which parameters require gradients, and which modules are in train mode."""
    return {
        "values": model.state_dict(),
        "learning": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "training": [name for name, module in model.named_modules() if module.training],
    }


def restore_model(model: Model, state: dict[str, Any]) -> None:
    model.load_state_dict(state["values"])
    learning, training = set(state["learning"]), set(state["training"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    for name, module in model.named_modules():
        module.training = name in training
