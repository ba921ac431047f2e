"""One picture with the detections of two networks."""

import importlib
from pathlib import Path
from typing import Any

from ...errors import InputError
from .. import images, loading, network

#: Colours of the classes, in turn.
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def draw(
    image: str | Path,
    original: str | Path,
    quantized: str | Path,
    target: str | Path,
    *,
    least: float = 0.25,
    image_size: int = 640,
) -> None:
    """Write a picture: the original's detections on the left, the quantized on the right.

    Args:
        image: The image file.
        original: A checkpoint.
        quantized: Output folder of ``run_yolo_pipeline``, or another checkpoint.
        target: ``.png`` or ``.jpg`` file to write.
        least: Confidence below which boxes are left out.
        image_size: Longer side in the network, a multiple of 32.

    Raises:
        InputError: A file is not usable.
    """
    target = Path(target)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"{target} ends neither in .png nor in .jpg: name it so")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a folder: make it first")
    (picture,), _ = images.load([Path(image)], image_size)
    Image = images.pillow()
    with Image.open(picture.path) as opened:
        base = opened.convert("RGB")
    sheet = Image.new("RGB", (2 * base.width + 8, base.height), "white")
    for column, source in enumerate((original, quantized)):
        wrapper = loading.load(source)
        panel = base.copy()
        rows = network.detections(wrapper.model, picture, least)
        _mark(panel, rows, wrapper.names)
        sheet.paste(panel, (column * (base.width + 8), 0))
    sheet.save(target)


def _mark(panel: Any, rows: Any, names: dict[int, str]) -> None:
    drawing, fonts = (importlib.import_module(f"PIL.Image{part}") for part in ("Draw", "Font"))
    pen = drawing.Draw(panel)
    width = max(2, panel.width // 300)
    font = fonts.load_default(size=max(12, panel.width // 50))
    for left, top, right, bottom, confidence, index in rows:
        if right <= left or bottom <= top:
            continue
        colour = COLOURS[int(index) % len(COLOURS)]
        pen.rectangle((left, top, right, bottom), outline=colour, width=width)
        text = f"{names.get(int(index), int(index))} {confidence:.2f}"
        pen.rectangle(pen.textbbox((left, top), text, font=font), fill=colour)
        pen.text((left, top), text, fill="white", font=font)
