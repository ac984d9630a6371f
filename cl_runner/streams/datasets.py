"""Data sets by name, and where to read them from."""

import contextlib
import io
import json
import logging
import os
import socket
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cl_runner.errors import ConfigError, did_you_mean
from cl_runner.streams.base import Shape
from cl_runner.streams.cache import DataSet, cached, locked, no_empty_folders
from cl_runner.streams.folder import LAYOUT, ImageFolder

log = logging.getLogger("cl_runner")

DOWNLOAD_TIMEOUT = 30  # seconds without an answer


class Source(Protocol):
    """A data set that has been found."""

    @property
    def num_classes(self) -> int: ...

    def read(self, verify: bool = True) -> DataSet:
        """Decode it or take it from the cache; `verify`: check cached images against their checksum."""
        ...


@dataclass(frozen=True)
class Known:
    """What is known about a data set before it is read."""

    title: str  # the name of torchvision's class, if there is one
    num_classes: int
    image_shape: Shape
    folder: str = ""  # under the data root, as torchvision lays it out
    files: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None  # of images in [0, 1]; None: computed from the training images
    std: tuple[float, ...] | None = None
    train: dict[str, Any] = field(default_factory=lambda: {"train": True})  # arguments of torchvision's class
    test: dict[str, Any] = field(default_factory=lambda: {"train": False})
    transposed: bool = False

    def paths(self, data_root: Path) -> list[Path]:
        return [data_root / self.folder / file for file in self.files]


def _idx(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}-{what}-ubyte" for part in parts for what in ("images-idx3", "labels-idx1"))


_IDX = _idx("train", "t10k")

KNOWN = {
    "digits": Known("digits", 10, (1, 8, 8)),
    "mnist": Known("MNIST", 10, (1, 28, 28), "MNIST/raw", _IDX, (0.1307,), (0.3081,)),
    "fashion_mnist": Known("FashionMNIST", 10, (1, 28, 28), "FashionMNIST/raw", _IDX, (0.2860,), (0.3530,)),
    "kmnist": Known("KMNIST", 10, (1, 28, 28), "KMNIST/raw", _IDX),
    "emnist": Known(
        "EMNIST",
        47,
        (1, 28, 28),
        "EMNIST/raw",
        _idx("emnist-balanced-train", "emnist-balanced-test"),
        train={"split": "balanced", "train": True},
        test={"split": "balanced", "train": False},
        transposed=True,
    ),
    "svhn": Known(
        "SVHN",
        10,
        (3, 32, 32),
        files=("train_32x32.mat", "test_32x32.mat"),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        train={"split": "train"},
        test={"split": "test"},
    ),
    "cifar10": Known(
        "CIFAR10",
        10,
        (3, 32, 32),
        "cifar-10-batches-py",
        (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Known(
        "CIFAR100",
        100,
        (3, 32, 32),
        "cifar-100-python",
        ("train", "test", "meta"),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2761),
    ),
}


def find(name: str, data_root: Path, image_size: int | None = None, download: bool = True) -> Source:
    """The data set `name`: torchvision's copy under `data_root`, or else the folder of images `data_root`/`name`, or
    else, for a known name, torchvision's download.

    Raises ConfigError that says what to put where.
    """
    if name == "digits":
        return Digits()
    known, folder = KNOWN.get(name), data_root / name
    if known is None:
        if not folder.is_dir():
            expected = f"expected one of {', '.join(KNOWN)} or a folder of images {folder}/{LAYOUT}, got {name!r}"
            raise ConfigError("stream.name", "; ".join(filter(None, [expected, did_you_mean(name, KNOWN)])))
        return ImageFolder(folder, image_size)
    if (lock := _lock(name, data_root)).exists():
        with contextlib.suppress(OSError), locked(lock):  # a download in progress has incomplete files there
            pass
    if not _present(known, data_root):
        if (folder / "train").is_dir():
            return KnownFolder(folder, known)
        _fetch(name, known, data_root, download)
    return Torchvision(name, known, data_root)


class Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16 scaled to 0 to 255.

    They come as one set; a fixed fifth of each class, drawn by numpy's RandomState(0), is the test set.
    """

    num_classes = 10

    def read(self, verify: bool = True) -> DataSet:
        from sklearn.datasets import load_digits

        pixels, numbers = load_digits(return_X_y=True)
        images = torch.from_numpy(np.rint(pixels * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
        labels = torch.from_numpy(numbers).long()
        random = np.random.RandomState(0)
        test = torch.zeros(len(labels), dtype=torch.bool)
        for number in range(10):
            rows = random.permutation(np.flatnonzero(numbers == number))
            test[rows[: round(0.2 * len(rows))]] = True
        return DataSet(images[~test], labels[~test], images[test], labels[test])


class Torchvision:
    """torchvision's copy of a known data set, with its layout and checksums."""

    def __init__(self, name: str, known: Known, data_root: Path) -> None:
        self.name, self.known, self.data_root = name, known, data_root
        self.num_classes = known.num_classes

    def read(self, verify: bool = True) -> DataSet:
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.known.paths(self.data_root)]
        fingerprint = sha256(json.dumps(stats).encode()).hexdigest()[:16]
        return cached(self.data_root, f"{self.name}-{fingerprint}", self._decode, verify)

    def _decode(self) -> DataSet:
        log.info("decoding %s in %s, once", self.known.title, self.data_root)
        try:
            train, test = _open(self.known, self.data_root)
        except Exception as error:  # torchvision's readers may raise anything on a broken file
            files = _braces(self.known, self.data_root)
            remedy = "remove what is broken and it is downloaded again"
            raise ConfigError("data_root", f"expected sound files {files}, got {_reason(error)}; {remedy}") from error
        images = [_images(part, self.known.transposed) for part in (train, test)]
        labels = [_labels(part) for part in (train, test)]
        return DataSet(images[0], labels[0], images[1], labels[1])


class KnownFolder(ImageFolder):
    """A known data set as a folder of images, with the known number of classes and image shape."""

    def __init__(self, folder: Path, known: Known) -> None:
        super().__init__(folder, channels=known.image_shape[0])
        self.known = known
        if self.num_classes != known.num_classes:
            expected = f"expected the {known.num_classes} classes of {known.title} in {folder}"
            raise ConfigError("data_root", f"{expected}, got {self.num_classes}; another data set needs another name")

    def read(self, verify: bool = True) -> DataSet:
        data = super().read(verify)
        if data.image_shape != self.known.image_shape:
            expected, got = (f"{width}x{height}" for _, height, width in (self.known.image_shape, data.image_shape))
            raise ConfigError(
                "data_root", f"expected {expected} images of {self.known.title} in {self.folder}, got {got}"
            )
        return data


def _lock(name: str, data_root: Path) -> Path:
    return data_root / ".cl_runner" / f"{name}.lock"


def _present(known: Known, data_root: Path) -> bool:
    return all(path.is_file() for path in known.paths(data_root))


def _open(known: Known, data_root: Path, download: bool = False) -> tuple[Any, Any]:
    """torchvision's training and test set."""
    from torchvision import datasets

    make = getattr(datasets, known.title)
    return make(data_root, **known.train, download=download), make(data_root, **known.test, download=download)


def _fetch(name: str, known: Known, data_root: Path, download: bool) -> None:
    """Have torchvision download the data set, with its own checksums."""
    reason = "stream.download is false"
    if download:
        try:
            with no_empty_folders(data_root / known.folder), locked(_lock(name, data_root)):
                if _present(known, data_root):  # downloaded by another process while this one waited
                    return
                log.info("downloading %s into %s", known.title, data_root)
                with _patience(), _silence():
                    _open(known, data_root, download=True)
                if _present(known, data_root):
                    return
                raise RuntimeError("the files are still not there")
        except Exception as error:  # torchvision passes on any error of network, disk or archive
            reason = f"the download failed: {_reason(error)}"
    put = f"put {_braces(known, data_root)} or a folder of images {data_root / name}/{LAYOUT} there"
    raise ConfigError("data_root", f"expected {known.title} in {data_root}, got nothing ({reason}); {put}")


@contextlib.contextmanager
def _patience():
    """Give up on a server that does not answer; torchvision itself would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _silence():
    """Suppress progress bars, which would precede an error of one line."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _braces(known: Known, data_root: Path) -> str:
    return f"{data_root / known.folder}{os.sep}{{{','.join(known.files)}}}"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _images(part: Any, transposed: bool) -> Tensor:
    """[N, C, H, W] uint8 of a torchvision data set, which holds [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    pixels = torch.as_tensor(part.data)
    if pixels.dim() == 3:
        pixels = (pixels.transpose(1, 2) if transposed else pixels)[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.contiguous()


def _labels(part: Any) -> Tensor:
    return torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets).long()
