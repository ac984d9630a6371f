"""Small data sets, laid out on disk like the real ones."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_idx(path: Path, values: np.ndarray) -> None:
    """`values`, uint8, in the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + values.ndim}i", 2048 + values.ndim, *values.shape) + values.tobytes())


def write_mnist(
    root: Path, folder: str = "MNIST", size: int = 30, parts: tuple[str, str] = ("train", "t10k"), num_classes: int = 10
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random 28x28 images under `root`/`folder`/raw: part -> images [size, 28, 28], labels [size]."""
    random = np.random.RandomState(0)
    written = {}
    for part in parts:
        images = random.randint(0, 256, (size, 28, 28)).astype(np.uint8)
        labels = (np.arange(size) % num_classes).astype(np.uint8)
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", labels)
        written[part] = images, labels
    return written


def write_folder(
    folder: Path,
    classes: list[str],
    size: tuple[int, int] = (6, 6),
    train: int = 4,
    test: int = 2,
    mode: str = "RGB",
    suffix: str = "png",
) -> None:
    """Random images of `size` (width, height), `train` and `test` of each class."""
    random = np.random.RandomState(1)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.randint(0, 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number:03d}.{suffix}")


def read_image(path: Path) -> np.ndarray:
    """[H, W] or [H, W, C] uint8."""
    with Image.open(path) as image:
        return np.array(image)
