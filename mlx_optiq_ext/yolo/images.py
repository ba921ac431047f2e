"""Reads images from a folder and fits them into the network's input."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError, UnsupportedError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

#: Stride of the network's coarsest level, in pixels.
STRIDE = 32

#: Padding value, as in training.
GREY = (114, 114, 114)


@dataclass(frozen=True)
class Picture:
    """One image, scaled by ``ratio`` and padded by ``left`` and ``top``.

    Attributes:
        path: Where it comes from.
        pixels: (1, height, width, 3) float32 from 0 to 1, sides multiples of 32.
        size: Width and height of the original.
        ratio: Scale from the original to ``pixels``.
        left: Padding before the first column, half of all; may end in .5.
        top: Padding before the first row, half of all; may end in .5.
    """

    path: Path
    pixels: mx.array
    size: tuple[int, int]
    ratio: float
    left: float
    top: float

    def restored(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes in pixels of the original, clipped to it.

        Args:
            boxes: (n, 4) centre x, centre y, width, height in the padded image.

        Returns:
            (n, 4) left, top, right, bottom.
        """
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        corners = np.concatenate([centre - half, centre + half], axis=1)
        corners = (corners - np.tile([self.left, self.top], 2)) / self.ratio
        return np.clip(corners, 0, np.tile(self.size, 2))


def pillow() -> Any:
    """Pillow's Image module.

    Raises:
        UnsupportedError: Pillow is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UnsupportedError("images need Pillow: pip install 'mlx-optiq-ext[yolo]'") from error


def find(folder: str | Path) -> list[Path]:
    """The image files of a folder, by name.

    Raises:
        InputError: The path is not a folder, or the folder has no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with a few images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InputError(
            f"{folder} holds no image ({', '.join(SUFFIXES)}): put a few into it, such as the "
            "network will see"
        )
    return paths


def load(paths: list[Path], size: int = 640) -> tuple[list[Picture], list[str]]:
    """Read images and fit them.

    Args:
        paths: Image files.
        size: Length of the longer side.

    Returns:
        The images that could be read, and a line for each that could not.

    Raises:
        InputError: No image could be read, or ``size`` is not a positive multiple of 32.
    """
    if size <= 0 or size % STRIDE:
        raise InputError(f"an image size of {size} is not a positive multiple of {STRIDE}")
    found, skipped = [], []
    for path in paths:
        try:
            found.append(fit(path, size))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors for damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            skipped.append(f"{path} is skipped, it cannot be read as an image: {reason}")
    if not found:
        raise InputError(f"no image can be read. {skipped[0] if skipped else 'There are none.'}")
    return found, skipped


def fit(path: Path, size: int) -> Picture:
    """Read one image, scale its longer side to ``size`` and pad both to multiples of 32.

    Raises:
        OSError: It is missing or damaged.
    """
    Image = pillow()
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    ratio = min(size / height, size / width)
    scaled = (round(width * ratio), round(height * ratio))
    if min(scaled) < 1:
        raise ValueError(f"{width} x {height} pixels are too narrow")
    pads = [-length % STRIDE / 2 for length in scaled]
    # An odd pixel goes to the right and to the bottom.
    before = [round(pad - 0.1) for pad in pads]
    after = [round(pad + 0.1) for pad in pads]
    sides = [s + b + a for s, b, a in zip(scaled, before, after, strict=True)]
    canvas = Image.new("RGB", tuple(sides), GREY)
    canvas.paste(image.resize(scaled, Image.Resampling.BILINEAR), tuple(before))
    pixels = mx.array(np.asarray(canvas, np.float32) / 255)[None]
    return Picture(path, pixels, (width, height), ratio, pads[0], pads[1])
