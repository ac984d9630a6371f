"""A model's first layer: from the stream's uint8 images to the backbone's inputs."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Interpolation = Literal["bilinear", "bicubic"]


class Preprocess(nn.Module):
    """Augment (in train mode only), scale to [0, 1], repeat gray to the backbone's channels, resize, normalise.

    Images are uint8 everywhere else, so replay, Fisher, herding and evaluation need no transforms of their own. All of
    this runs on whole batches, on the device.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Sequence[str] = (),
        crop_padding: int = 4,
        channels_last: bool = False,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        """`channels`: what the backbone takes; `size`: H, W to resize to (None: no resizing); `mean` and `std`: per
        channel, of images in [0, 1] (None: leave them there); `augment`: any of "crop" (a random window after padding
        with black), "flip" (left to right, with probability 1/2) and "brightness" (by up to a quarter)."""
        super().__init__()
        self.channels, self.size, self.augment, self.crop_padding = channels, size, tuple(augment), crop_padding
        self.interpolation: Interpolation = interpolation
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        centre = torch.tensor(mean if mean is not None else [0.0]).view(1, -1, 1, 1)
        spread = torch.tensor(std if std is not None else [1.0]).view(1, -1, 1, 1)
        # One multiplication and one addition for both the scaling by 255 and the normalisation.
        self.register_buffer("scale", 1 / (255 * spread), persistent=False)
        self.register_buffer("shift", -centre / spread, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> [B, channels, *size] float32.

        Raises TypeError for images of another type (those in [0, 1] would be black), ValueError for other channels.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"expected images as uint8, 0 to 255, got {images.dtype}".replace("torch.", ""))
        if images.shape[1] not in (1, self.channels):
            raise ValueError(f"expected images [B, {self.channels}, H, W] or gray ones, got {list(images.shape)}")
        if self.training:
            if "crop" in self.augment:
                images = random_crop(images, self.crop_padding)
            if "flip" in self.augment:
                images = random_flip(images)
        images = images.float()
        if self.training and "brightness" in self.augment:
            images = random_brightness(images)
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.interpolation, antialias=True, align_corners=False)
            images = images.clamp(0, 255) if self.interpolation == "bicubic" else images  # it overshoots at edges
        if images.shape[1] == 1 and self.channels > 1:
            images = images.expand(-1, self.channels, -1, -1)
        return torch.addcmul(self.shift, images, self.scale).contiguous(memory_format=self.memory_format)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image [C, H, W] by up to `padding` pixels each way, filling with black; one gather per batch."""
    size, (height, width) = len(images), images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, size, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)  # [B, H]
    columns = left + torch.arange(width, device=images.device)  # [B, W]
    batch = torch.arange(size, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def random_brightness(images: Tensor) -> Tensor:
    """Scale each image [C, H, W], of values up to 255, by U(1 - 63/255, 1 + 63/255) (as PyCIL), clipped at white."""
    factors = 1 + (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1) * 63 / 255
    return (images * factors).clamp(max=255)
