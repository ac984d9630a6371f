"""One data set, rotated by a different angle in every task (Buzzega et al., 2020, arXiv 2004.07211).

Lopez-Paz & Ranzato (2017, arXiv 1706.08840) draw ascending angles instead, from one equal interval after the other.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.streams.recipe import Remapped


@dataclass(kw_only=True)
class Rotated(Remapped):
    """Each task rotates the images counter-clockwise about their centre, to the nearest pixel, filling with black.

    max_angle: in degrees; each task's angle is drawn by `seed` from U(0, max_angle).
    angles: in degrees, one per task, to use instead.

    Equal to PIL's `Image.rotate` of every image, pixel for pixel: PIL rotates an image of pixel indices, once per task.
    """

    max_angle: float = 180.0
    angles: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.angles is not None and len(self.angles) != self.num_tasks:
            expected = f"expected {self.num_tasks} angles, one per task"
            raise ConfigError("stream.angles", f"{expected}, got {len(self.angles)}")

    def angle(self, index: int) -> float:
        """The angle of task `index`, in degrees."""
        if self.angles is not None:
            return self.angles[index]
        return float(np.random.RandomState(self.seed).uniform(0, self.max_angle, self.num_tasks)[index])

    def sources(self, index: int, height: int, width: int) -> Tensor:
        numbers = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)  # PIL fills with 0
        turned = Image.fromarray(numbers).rotate(self.angle(index))
        return torch.from_numpy(np.array(turned)).flatten().long() - 1
