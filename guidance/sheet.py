"""Pictures on one sheet, and the way from noise to them as an animation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.images import to_image


def grid(images: Tensor, columns: int | None = None, scale: int = 4) -> Image.Image:
    """[N, 3, S, S] in [-1, 1] -> one picture, rows of `columns` (default: nearly square), each pixel `scale` wide."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    size = images.shape[-1] * scale
    gap = 2
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), (255, 255, 255))
    for i, image in enumerate(images):
        tile = to_image(image).resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + (i % columns) * (size + gap), gap + (i // columns) * (size + gap)))
    return sheet


def save_grid(images: Tensor, about: Mapping[str, Any], path: Path) -> None:
    """Write the pictures as a PNG grid whose text chunks say how they were made. Raises UsageError if that fails."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    _save(grid(images), path, format="PNG", pnginfo=info)


def save_gif(trajectory: Sequence[Tensor], path: Path) -> None:
    """Write each step's x0, from noise to pictures, as an animation that rests on the last."""
    frames = [grid(x0) for x0 in trajectory]
    durations = [80] * (len(frames) - 1) + [1500]
    _save(frames[0], path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
