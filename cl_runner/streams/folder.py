"""Images in folders, one folder per class."""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.streams.cache import DataSet, cached

log = logging.getLogger("cl_runner")

SUFFIXES = (".png", ".jpg", ".jpeg")
LAYOUT = "{train,test}/<class>/*.png|jpg|jpeg"
CHUNK = 256  # images per task of a thread


class ImageFolder:
    """`folder`/{train,test}/<class>/*.png|jpg|jpeg; classes are numbered in the order of their names.

    If all names are whole numbers, they are ordered as numbers. Images are RGB, or gray if all of them are. With
    `image_size`, their shorter side is scaled to it and the centre square is kept. `channels`: 1 or 3, None to find
    out.

    Raises ConfigError that names the path if a part or a class is missing or empty; on reading, if an image cannot be
    read or, without `image_size`, images differ in size.
    """

    def __init__(self, folder: Path, image_size: int | None = None, channels: int | None = None) -> None:
        self.folder, self.image_size, self.channels = folder, image_size, channels
        train, test = _classes(folder / "train"), _classes(folder / "test")
        for name in sorted(train.keys() ^ test.keys()):
            there, lacking = ("train", "test") if name in train else ("test", "train")
            expected = f"expected the same classes in {folder}/{{train,test}}"
            raise ConfigError("data_root", f"{expected}, got {there}/{name} and no {lacking}/{name}")
        numbered = all(name.isdecimal() for name in train)
        self.classes = sorted(train, key=int if numbered else str)
        self.train, self.test = ([part[name] for name in self.classes] for part in (train, test))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def read(self, verify: bool = True) -> DataSet:
        key = f"{self.folder.name}-{self._fingerprint()}"
        return cached(self.folder.parent, key, self._decode, verify)

    @property
    def contents(self) -> str:
        """A digest that changes if images are added, removed or differ in size, but not if all are copied."""
        return _digest([(name, stat.st_size) for name, stat in self._named()])

    def _fingerprint(self) -> str:
        """A digest that changes if images are added, removed or rewritten."""
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in self._named()]
        return _digest([self.image_size, self.channels, files])

    def _named(self) -> Iterator[tuple[str, os.stat_result]]:
        root = len(str(self.folder))
        return ((file.path[root:], file.stat()) for file in self._files())

    def _files(self) -> list[os.DirEntry[str]]:
        return [file for part in (self.train, self.test) for files in part for file in files]

    def _decode(self) -> DataSet:
        paths = [Path(file) for file in self._files()]
        log.info("decoding the %d images in %s, once", len(paths), self.folder)
        images = decode(paths, self.image_size, self.channels)
        train, test = _labels(self.train), _labels(self.test)
        return DataSet(images[: len(train)], train, images[len(train) :], test)


def decode(paths: list[Path], size: int | None, channels: int | None) -> Tensor:
    """The images, [N, C, H, W] uint8, with C = `channels`, or else 1 if all of them are gray and 3 if not."""
    first = _open(paths[0], size)
    guess = channels or (1 if first.mode == "L" else 3)
    images = np.empty((len(paths), guess, first.height, first.width), np.uint8)

    def fill(start: int) -> bool:
        """Whether `guess` channels suffice for this chunk."""
        for row, path in enumerate(paths[start : start + CHUNK], start):
            image = _open(path, size)
            if guess == 1 and channels is None and image.mode != "L":
                return False
            if image.size != first.size:
                sizes = f"{first.width}x{first.height} in {paths[0]} and {image.width}x{image.height} in {path}"
                raise ConfigError("stream.image_size", f"expected a size to bring the images to, which differ: {sizes}")
            pixels = np.asarray(image.convert("L" if guess == 1 else "RGB"))
            images[row] = pixels if guess == 1 else pixels.transpose(2, 0, 1)
        return True

    # Small images cost mostly interpreter time, for which threads compete (CIFAR-100: two take 1.5 times as long).
    threads = 1 if paths[0].stat().st_size < 8192 else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        fits = all(pool.map(fill, range(0, len(paths), CHUNK)))
    return torch.from_numpy(images) if fits else decode(paths, size, channels=3)


def _digest(what: list[Any]) -> str:
    return sha256(json.dumps(what).encode()).hexdigest()[:16]


def _open(path: Path, size: int | None) -> Image.Image:
    """The image, in mode L if it is gray and in RGB if not."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                raise ValueError("it has 16 or 32 bits per channel, not 8")  # Pillow would clip them at 255
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError("data_root", f"expected an image, got {path}: {error}") from error
    return image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _classes(folder: Path) -> dict[str, list[os.DirEntry[str]]]:
    """The images of each class, in the order of their names."""
    if not folder.is_dir():
        raise ConfigError("data_root", f"expected images in {folder.parent}/{LAYOUT}, got no folder {folder}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: _images(folder / name) for name in names}
    if not classes:
        raise ConfigError("data_root", f"expected images in {folder.parent}/{LAYOUT}, got no class in {folder}")
    return classes


def _images(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")]
    if not found:
        raise ConfigError("data_root", f"expected images (*.png|jpg|jpeg) in {folder}, got none")
    return sorted(found, key=lambda entry: entry.name)


def _labels(part: list[list[os.DirEntry[str]]]) -> Tensor:
    """[N] int64: the class number of each image, class after class."""
    return torch.arange(len(part)).repeat_interleave(torch.tensor([len(files) for files in part]))
