"""One data set, turned by another angle in every task (Lopez-Paz & Ranzato, 2017, https://arxiv.org/abs/1706.08840)."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.streams.recipe import Remapped


@dataclass(kw_only=True)
class Rotated(Remapped):
    """Each task turns the images counter-clockwise about their centre, the nearest pixel and black coming in.

    max_angle: in degrees; each task's angle is drawn by `seed` from U(0, max_angle).
    angles: a given angle a task, in degrees, instead.

    Pixel for pixel what PIL's `Image.rotate` does to every image: PIL itself turns the pixels' numbers, once a task.
    """

    max_angle: float = 180.0
    angles: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.angles is not None and len(self.angles) != self.num_tasks:
            expected = f"expected {self.num_tasks} angles, one a task"
            raise ConfigError("stream.angles", f"{expected}, got {len(self.angles)}")

    def angle(self, index: int) -> float:
        """Of task `index`, in degrees."""
        if self.angles is not None:
            return self.angles[index]
        return float(np.random.RandomState(self.seed).uniform(0, self.max_angle, self.num_tasks)[index])

    def sources(self, index: int, height: int, width: int) -> Tensor:
        numbers = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)  # 0 is what PIL fills with
        turned = Image.fromarray(numbers).rotate(self.angle(index))
        return torch.from_numpy(np.array(turned)).flatten().long() - 1
