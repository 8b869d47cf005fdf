"""Writes pictures with their metadata: a grid, single files, or the denoising as an animation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipkit.data.images import to_image
from clipkit.errors import UsageError
from clipkit.inputs import check_file, check_writable


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


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_DESCRIPTION = 0x010E
"""EXIF's ImageDescription: JPEG and WebP have no text chunks."""


def check_places(out: str, gif: Path | None, n: int) -> None:
    """Check before the drawing that it can be written: to `out`, one file or a folder of `n`, and to `gif`.

    Raises UsageError for a suffix of another format, a place that cannot be written, and a folder in which pictures of
    an earlier, larger drawing would stay.
    """
    path = Path(out)
    if is_folder(out):
        check_writable(path)
        others = [file.name for file in path.glob("[0-9]*.png") if file.stem.isdecimal() and int(file.stem) >= n]
        if others:
            raise UsageError(f"{path} holds {min(others)}, which {n} pictures would not replace; give another folder")
    elif path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{out} does not say what to write; end it in {', '.join(FORMATS)} for one grid, or in / for single "
            "pictures in a folder"
        )
    else:
        check_file(path, list(FORMATS))
    if gif is not None:
        check_file(gif, [".gif"])


def is_folder(out: str) -> bool:
    """Whether single pictures are wanted: `out` ends in a slash, or is a folder."""
    return out.endswith(("/", os.sep)) or os.path.isdir(out)


def save_grid(images: Tensor, about: Mapping[str, Any], path: Path) -> None:
    """Write the pictures as one grid, in the format of the suffix, with metadata.

    Raises UsageError if that fails.
    """
    _save_with(grid(images), about, path)


def save_pictures(images: Tensor, abouts: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write each of [N, 3, S, S] in [-1, 1] at its own size, as 0000.png and so on, with its own metadata."""
    for i, (image, about) in enumerate(zip(images, abouts, strict=True)):
        _save_with(to_image(image), about, folder / f"{i:04d}.png")


def save_gif(trajectory: Sequence[Tensor], path: Path) -> None:
    """Write each step's x0, from noise to pictures, as an animation that rests on the last."""
    frames = [grid(x0) for x0 in trajectory]
    durations = [80] * (len(frames) - 1) + [1500]
    _save(frames[0], path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _save_with(image: Image.Image, about: Mapping[str, Any], path: Path) -> None:
    """PNGs have a text chunk for each key, the others one JSON object in EXIF's ImageDescription."""
    kind = FORMATS[path.suffix.lower()]
    if kind == "PNG":
        info = PngInfo()
        for key, value in about.items():
            text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            # Words of a command line that were no UTF-8 are lone surrogates here.
            info.add_text(key, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
        _save(image, path, format=kind, pnginfo=info)
        return
    exif = Image.Exif()
    exif[_DESCRIPTION] = json.dumps(dict(about), allow_nan=False)
    how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    _save(image, path, format=kind, exif=exif, **how)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except (OSError, ValueError) as error:  # ValueError: more metadata than the format holds
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
