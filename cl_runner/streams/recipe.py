"""Base classes of recipes, which turn a data set into a stream of tasks."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.ranges import Count, Seed
from cl_runner.streams.base import Examples, Scenario, Shape, Stream, Task
from cl_runner.streams.cache import DataSet
from cl_runner.streams.datasets import KNOWN, find
from cl_runner.streams.folder import ImageFolder

log = logging.getLogger("cl_runner")


@dataclass(frozen=True)
class Part:
    """The training, validation or test part of a data set."""

    images: Tensor  # [N, C, H, W] uint8; training and validation share them
    labels: Tensor  # [N] int64, the data set's own class numbers
    rows: Tensor  # [n] int64: this part's rows of both


@dataclass(kw_only=True)
class Recipe(ABC):
    """A stream before its data is read.

    name: a known data set (`datasets.KNOWN`), or else a folder of images under the data root.
    scenario: in task and class, every task has labels of its own; in domain, the tasks share theirs.
    max_tasks: end the stream after so many tasks; labels, head and permutations stay those of the whole stream.
    pad_to: pad images with black to this many pixels each way.
    normalize: by the data set's mean and standard deviation, in the model; otherwise images stay in [0, 1].
    mean, std: for `normalize`, one per channel of images in [0, 1]; None: those published for a known data set, or
        else computed from its training images.
    image_size: resize and crop a folder's images to this square when decoding; required if they differ in size.
    max_per_class: limit of the training images; all test images stay.
    validation: share of each class's training images (after `max_per_class`) to set aside.
    augment: of training images, in the model: "crop" (after padding by `crop_padding`), "flip", "brightness".
    seed: of all random choices: images left out or set aside, permutations, angles.
    download: let torchvision download missing data.
    max_device_gb: decoded images larger than this stay in host memory, and batches are moved to the device.

    Raises ConfigError for invalid settings; for a known data set, before any data is read.
    """

    name: str
    scenario: Scenario
    num_tasks: Count
    max_tasks: Count | None = None
    pad_to: Count | None = None
    normalize: bool = False
    mean: list[float] | None = None
    std: list[PositiveFloat] | None = None
    image_size: Count | None = None
    max_per_class: Count | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: list[Literal["crop", "flip", "brightness"]] = field(default_factory=list)
    crop_padding: NonNegativeInt = 4
    seed: Seed = 0
    download: bool = True
    max_device_gb: NonNegativeFloat = 8.0

    def __post_init__(self) -> None:
        self.scenario = Scenario(self.scenario)  # a configuration has its plain name
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ConfigError("stream.name", f"expected a data set or a folder in the data root, got '{self.name}'")
        if self.max_tasks is not None and self.max_tasks > self.num_tasks:
            expected = f"expected at most num_tasks={self.num_tasks}"
            raise ConfigError("stream.max_tasks", f"{expected}, got {self.max_tasks}")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("stream.std", f"expected mean and std or neither, got mean {self.mean}, std {self.std}")
        self._num_source_classes: int | None = None
        if known := KNOWN.get(self.name):
            if self.image_size is not None:
                own = f"{known.image_shape[2]}x{known.image_shape[1]} pixels; a model resizes by its own image size"
                raise ConfigError("stream.image_size", f"expected null: {self.name} has {own}; got {self.image_size}")
            self._check(known.num_classes, known.image_shape)

    @property
    def num_classes(self) -> int:
        """Size of the label space of all tasks; of a folder of images, only after `prepare`."""
        assert self._num_source_classes is not None, "a folder's classes are counted by prepare"
        return self.label_space(self._num_source_classes)

    @property
    def task_sizes(self) -> list[int] | None:
        """How many classes each task has; None for a folder of images before `prepare`."""
        if self._num_source_classes is None:
            return None
        tasks = [self.labels(index, self._num_source_classes) for index in range(self.max_tasks or self.num_tasks)]
        return [int((labels >= 0).sum()) for labels in tasks]

    @property
    def image_shape(self) -> Shape:
        """C, H, W of the tasks' images; of a folder of images, only after `prepare`."""
        channels, *size = self._image_shape
        height, width = (self.pad_to or each for each in size)
        return channels, height, width

    def prepare(self, data_root: str) -> None:
        """Make sure that the data exists, downloading it if necessary, and is decoded in the cache.

        Raises ConfigError that says what to put where, or what is wrong with the data.
        """
        found = examine(self.name, Path(data_root).expanduser(), self.image_size, self.download)
        self._check(*found)
        self._check_tasks()

    def contents(self, data_root: str) -> str | None:
        """A digest of a folder's images by name and size, since users may change them; None for other data sets, and
        for a folder that does not exist."""
        try:
            source = find(self.name, Path(data_root).expanduser(), self.image_size, download=False)
        except ConfigError:
            return None
        return source.contents if isinstance(source, ImageFolder) else None

    def load(self, data_root: str, device: torch.device) -> Stream:
        """The stream, with its images on `device` unless they are larger than `max_device_gb`.

        Raises ConfigError like `prepare`, and for a validation share that rounds to no image.
        """
        source = find(self.name, Path(data_root).expanduser(), self.image_size, self.download)
        data = source.read()
        self._check(source.num_classes, data.image_shape)
        self._check_tasks()
        mean, std = self._statistics(data.train_images)
        parts = self._parts(data, device)
        tasks = [self._task(index, parts) for index in range(self.max_tasks or self.num_tasks)]
        if self.scenario != Scenario.CLASS and all(len(task.classes) == 1 for task in tasks):
            log.warning("stream.num_tasks: tasks of one class, whose %s accuracy is always 100 %%", self.scenario)
        channels, height, width = parts["test"].images.shape[1:]
        return Stream(
            scenario=self.scenario,
            tasks=tasks,
            num_classes=self.num_classes,
            image_shape=(channels, height, width),
            mean=mean,
            std=std,
            augment=tuple(self.augment),
            crop_padding=self.crop_padding,
        )

    @abstractmethod
    def label_space(self, num_classes: int) -> int:
        """The number of the stream's labels, given the number of the data set's classes."""

    @abstractmethod
    def labels(self, index: int, num_classes: int) -> Tensor:
        """[num_classes] int64: task `index`'s label for each of the data set's classes; -1 for those it lacks."""

    def pixels(self, images: Tensor, index: int) -> Tensor:
        """Images [N, C, H, W] uint8 as they look in task `index`."""
        return images

    @abstractmethod
    def check_classes(self, num_classes: int) -> None:
        """Raise ConfigError if this number of classes cannot be divided into the tasks."""

    def _check(self, num_classes: int, image_shape: Shape) -> None:
        self.check_classes(num_classes)
        self._num_source_classes = num_classes
        self._image_shape = image_shape
        channels, *size = image_shape
        if self.pad_to is not None and self.pad_to < max(size):
            raise ConfigError("stream.pad_to", f"expected at least the images' {max(size)} pixels, got {self.pad_to}")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != channels:
                raise ConfigError(f"stream.{key}", f"expected {channels} numbers, one per channel, got {values}")

    def _check_tasks(self) -> None:
        if 0 in (sizes := self.task_sizes or []):
            raise ConfigError("stream", f"expected at least one class in each task, got none in task {sizes.index(0)}")

    def _statistics(self, images: Tensor) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and standard deviation per channel, of images in [0, 1]; those set aside for validation count too."""
        if not self.normalize:
            return None, None
        if self.mean is not None and self.std is not None:
            return tuple(self.mean), tuple(self.std)
        known = KNOWN.get(self.name)
        if known is not None and known.mean is not None:
            return known.mean, known.std
        return statistics(images)

    def _parts(self, data: DataSet, device: torch.device) -> dict[str, Part]:
        train, test = (self._pad(images) for images in (data.train_images, data.test_images))
        place = device if train.nbytes + test.nbytes <= self.max_device_gb * 1e9 else torch.device("cpu")
        kept, held = select(data.train_labels, self.max_per_class, self.validation, self.seed)
        if self.validation and not len(held):
            most = int(data.train_labels[kept].bincount().max())
            expected = f"expected a share that sets aside one of the {most} training images per class"
            raise ConfigError("stream.validation", f"{expected}, got {self.validation}")
        train, train_labels = train.to(place), data.train_labels.to(place)
        everything = torch.arange(len(test), device=place)
        return {
            "train": Part(train, train_labels, kept.to(place)),
            "validation": Part(train, train_labels, held.to(place)),
            "test": Part(test.to(place), data.test_labels.to(place), everything),
        }

    def _pad(self, images: Tensor) -> Tensor:
        if self.pad_to is None:
            return images
        down, across = (self.pad_to - size for size in images.shape[-2:])
        return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))

    def _task(self, index: int, parts: dict[str, Part]) -> Task:
        assert self._num_source_classes is not None, "the data has been read"
        labels = self.labels(index, self._num_source_classes)

        def build(name: str) -> Examples:
            return self._examples(parts[name], labels, index)

        return Task(index, tuple(sorted(labels[labels >= 0].tolist())), build)

    def _examples(self, part: Part, labels: Tensor, index: int) -> Examples:
        """The part's images of classes for which task `index` has `labels` [num_classes]."""
        ours = labels.to(part.labels.device)[part.labels[part.rows]]  # [n]
        images = part.images[part.rows[ours >= 0]]
        ours = ours[ours >= 0]
        return Examples(self.pixels(images, index), ours, torch.full_like(ours, index))


@dataclass(kw_only=True)
class Remapped(Recipe):
    """Every task has all classes, and rearranges the data set's pixels in its own way."""

    scenario: Scenario = Scenario.DOMAIN

    @abstractmethod
    def sources(self, index: int, height: int, width: int) -> Tensor:
        """[height * width] int64: the source pixel of each position in task `index`; -1 for black."""

    def check_classes(self, num_classes: int) -> None:
        """Accept any number of classes."""

    def label_space(self, num_classes: int) -> int:
        return num_classes if self.scenario == Scenario.DOMAIN else self.num_tasks * num_classes

    def labels(self, index: int, num_classes: int) -> Tensor:
        first = 0 if self.scenario == Scenario.DOMAIN else index * num_classes
        return torch.arange(first, first + num_classes)

    def pixels(self, images: Tensor, index: int) -> Tensor:
        sources = self.sources(index, *images.shape[-2:]).to(images.device)
        flat = images.flatten(2)  # [N, C, H * W]
        moved = flat.gather(2, sources.clamp(min=0).expand_as(flat))  # nine times as fast as index_select on the CPU
        return moved.masked_fill_(sources < 0, 0).view_as(images)


@lru_cache
def examine(name: str, data_root: Path, image_size: int | None, download: bool) -> tuple[int, Shape]:
    """Number of classes and image shape of a data set, which is decoded into the cache.

    Runs once per process: a sweep asks for every job, and scanning a large folder takes a while.
    """
    source = find(name, data_root, image_size, download)
    return source.num_classes, source.read(verify=False).image_shape


def select(labels: Tensor, max_per_class: int | None, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [n] of the training images for training and for validation, chosen class by class, in ascending order.

    At least one image of each class is left for training.
    """
    random = np.random.RandomState(seed)
    numbers = labels.numpy()
    kept, held = [], []
    for number in np.unique(numbers):
        rows = random.permutation(np.flatnonzero(numbers == number))[:max_per_class]
        aside = min(round(validation * len(rows)), len(rows) - 1)
        held.append(rows[:aside])
        kept.append(rows[aside:])
    return torch.from_numpy(np.sort(np.concatenate(kept))), torch.from_numpy(np.sort(np.concatenate(held)))


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images [N, C, H, W] uint8, scaled to [0, 1]."""
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for chunk in images.split(1024):
        values = chunk.double() / 255
        total, squares = total + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
    count = images[:, 0].numel()
    mean = total / count
    # For a constant channel, one step of uint8 avoids a division by zero.
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
