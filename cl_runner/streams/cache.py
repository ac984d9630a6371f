"""A data set decoded once to uint8 and kept on disk."""

import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.streams.base import Shape

log = logging.getLogger("cl_runner")


@dataclass(frozen=True)
class DataSet:
    """Decoded images, labelled with the data set's own class numbers."""

    train_images: Tensor  # [N, C, H, W] uint8
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [N, C, H, W] uint8
    test_labels: Tensor  # [N] int64

    @property
    def image_shape(self) -> Shape:
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def checksum(self) -> str:
        code = 0
        for values in vars(self).values():
            code = zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy(), code)
        return f"{code:08x}"


def cached(data_root: Path, key: str, build: Callable[[], DataSet], verify: bool = True) -> DataSet:
    """The result of `build`, read from disk if it was built before under this `key`.

    Stored in `data_root`/.cl_runner, or in the user's cache folder if that is not writable. Of several processes, one
    builds and the others wait. A file that is damaged or not ours is rebuilt; `verify=False` does not read the images
    themselves (they are mapped, not loaded), so that only damage to its structure is noticed.

    Raises ConfigError if no folder is writable, and whatever `build` raises.
    """
    paths = [folder / f"{key}.safetensors" for folder in _folders(data_root)]
    for path in paths:
        if (data := _read(path, verify)) is not None:
            return data
    with no_empty_folders(paths[0].parent), no_empty_folders(paths[1].parent):
        path = _first_writable(paths)
        with locked(path.with_suffix(".lock")):
            if (data := _read(path, verify)) is not None:  # built by another process while this one waited
                return data
            if path.exists():
                log.warning("%s is damaged: rebuilding it", path)
            data = build()
            _write(path, data)
    return data


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes, and remove it afterwards."""
    lock = FileLock(path)
    with no_empty_folders(path.parent):
        while not lock.is_locked:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # its holder has failed, and removed the empty folder
                lock.acquire()
        try:
            yield
        finally:
            lock.release()
            # A process still waiting on the removed file will find the work done.
            path.unlink(missing_ok=True)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """If the body fails, remove `folder` and its parents as far as they are empty and were created meanwhile."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in absent:  # the deepest first
            with suppress(OSError):
                place.rmdir()
        raise


def _folders(data_root: Path) -> tuple[Path, Path]:
    """Where to store files, in order of preference; the second has a subfolder per data root."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return data_root / ".cl_runner", home / "cl_runner" / sha256(str(data_root.resolve()).encode()).hexdigest()[:8]


def _first_writable(paths: list[Path]) -> Path:
    for path in paths:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.access(path.parent, os.W_OK):
                return path
    folders = " or ".join(str(path.parent) for path in paths)
    raise ConfigError("data_root", f"expected a folder for decoded images that can be written, got {folders}")


def _read(path: Path, verify: bool) -> DataSet | None:
    """The data set in `path`; None if the file is absent, damaged or not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            data = DataSet(*(file.get_tensor(each.name) for each in fields(DataSet)))
            checksum = (file.metadata() or {})["crc32"]
    except (OSError, SafetensorError, KeyError):
        return None
    return data if not verify or data.checksum() == checksum else None


def _write(path: Path, data: DataSet) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        tensors = {name: values.contiguous() for name, values in vars(data).items()}
        save_file(tensors, temporary, metadata={"crc32": data.checksum()})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
