"""Image decoding, evaluation preprocessing and training augmentation: random resized crop, flip, colour jitter.

All untrusted image bytes are decoded here. Only JPEG, PNG and WebP are opened; the size in the header is checked before
decoding; an animation is its first frame. Images are uint8; the model normalises them on its device.

Evaluation resizes with Pillow, as published results do. Training decodes a large JPEG at a half, a quarter or an eighth
of its size, and resizes with torch's uint8 kernel. (torchvision.io decodes a tenth faster, but is deprecated.)
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from clipkit.config import DataConfig
from clipkit.data.orientation import orientation_of, upright
from clipkit.errors import SampleError

if TYPE_CHECKING:
    from clipkit.models.clip import CLIPConfig

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp")
"""File suffixes of these formats."""
# fmt: off
OTHER_SUFFIXES = (
    ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif",
    ".svg", ".svgz", ".ico", ".icns", ".cur", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".jxr",
    ".jls", ".psd", ".xcf", ".tga", ".dds", ".exr", ".hdr", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi",
    ".sgi", ".xbm", ".xpm", ".emf", ".wmf", ".eps", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw",
    ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw",
)
# fmt: on
"""File suffixes of image formats that are not read; such files are counted."""
MAX_PIXELS = 50_000_000

# Pillow has no base class of errors for damaged bytes, and decoders differ.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, Warning)


def decode(data: bytes, reduce_to: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes of a JPEG, PNG or WebP -> RGB image, upright (EXIF, XMP), transparency composited on white.

    With `reduce_to`, a JPEG is decoded at an eighth, a quarter or half of its size, as long as its shorter side keeps
    that many pixels. `max_pixels` limits the decoded size, after that reduction.
    Raises SampleError: "not an image", "too many pixels" or "damaged image".
    """
    image = _open(data)
    if reduce_to:
        _reduce(image, min(image.size) // reduce_to)
    _check_pixels(image, max_pixels)
    return _finish(image)


def _open(data: bytes) -> Image.Image:
    """An opened image whose header was read and checked; its pixels are not decoded yet."""
    try:
        try:
            image = _opened(data)
        except _DECODE_ERRORS:  # metadata may be damaged
            image = _opened(_without_metadata(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("too many pixels", str(error).split(",")[0]) from error
    except _DECODE_ERRORS as error:
        raise SampleError("not an image", f"no readable {', '.join(FORMATS)} header in {len(data)} bytes") from error
    _check_pixels(image, MAX_PIXELS)
    return image


def _opened(data: bytes) -> Image.Image:
    file = io.BytesIO(data)
    return _Jpeg(file) if format_of(data) == "jpeg" else Image.open(file, formats=FORMATS)


class _Jpeg(JpegImageFile):
    """A JPEG without Pillow's search for a resolution in the EXIF, which warns of odd entries.

    Nor does it look for further images in the same file (MPO).
    """

    def _read_dpi_from_exif(self) -> None:
        pass


def _without_metadata(data: bytes) -> bytes:
    """A JPEG or PNG without metadata, except those of pixels and orientation; other bytes unchanged.

    Pillow rejects an image for a large PNG text chunk, a wrong checksum of one, or a short Photoshop segment.
    """
    parts, at = [], 0
    if format_of(data) == "png":
        parts, at = [data[:8]], 8
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kind, content = data[at + 4 : at + 8], data[at + 4 : end - 4]
            sound = zlib.crc32(content) == int.from_bytes(data[end - 4 : end], "big")
            if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and sound):
                parts.append(data[at:end])
            at = end
    elif format_of(data) == "jpeg":
        parts, at = [data[:2]], 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):
            marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            needed = marker in (0xE0, 0xEE) or data[at + 4 : at + 10] == b"Exif\0\0"  # JFIF, Adobe's colours
            if needed or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                parts.append(data[at:end])
            at = end
    return b"".join([*parts, data[at:]])


def _check_pixels(image: Image.Image, limit: int) -> None:
    if image.width * image.height > limit:
        raise SampleError("too many pixels", f"{image.width}x{image.height} is over the limit of {limit}")


def _reduce(image: Image.Image, most: int) -> None:
    """Set a JPEG to be decoded at 1/8, 1/4 or 1/2 of its size, not below 1/most; other formats are unchanged."""
    if (reduced := next((n for n in (8, 4, 2) if n <= most), 1)) > 1:
        image.draft(image.mode, (image.width // reduced, image.height // reduced))


def _finish(image: Image.Image) -> Image.Image:
    try:
        return to_rgb(upright(image))
    except _DECODE_ERRORS as error:
        raise SampleError("damaged image", str(error)) from error


def format_of(data: bytes) -> str:
    """ "jpeg", "png" or "webp", by the first bytes of a readable image."""
    return "jpeg" if data[:3] == b"\xff\xd8\xff" else "png" if data[:4] == b"\x89PNG" else "webp"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB; transparent pixels become white, 16-bit greys keep their range."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layered)
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(
    image: Image.Image,
    size: int,
    resize: Literal["crop", "squash", "pad"] = "crop",
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    fill: int = 0,
) -> Tensor:
    """Evaluation transform -> uint8 [3, size, size].

    "crop" resizes the shorter side to `size` and crops the centre: the result of torchvision's Resize and CenterCrop,
    with which OpenAI and open_clip evaluate, without computing cropped pixels. "squash" resizes both sides to `size`.
    "pad" is open_clip's resize_mode "longest": longer side to `size`, with a margin of grey level `fill`. An image with
    an orientation (EXIF, XMP) is turned first, as `decode` does.
    """
    image = to_rgb(upright(image))
    if image.size != (size, size) and resize == "pad":
        image = _padded(image, size, Image.Resampling[interpolation.upper()], fill)
    if image.size != (size, size):
        box = _middle(*image.size, size) if resize == "crop" else None
        image = image.resize((size, size), Image.Resampling[interpolation.upper()], box=box)
    return to_pixels(image).contiguous()


def _padded(image: Image.Image, size: int, filter: Image.Resampling, fill: int) -> Image.Image:
    scale = max(image.size) / size
    width, height = (max(1, round(side / scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), (fill, fill, fill))
    canvas.paste(image.resize((width, height), filter), ((size - width) // 2, (size - height) // 2))
    return canvas


def _middle(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Box of the centre crop in the original image; resize and crop both round to integer pixels."""
    short = min(width, height)
    w, h = (size if side == short else int(size * side / short) for side in (width, height))
    left, top = round((w - size) / 2), round((h - size) / 2)
    return left * width / w, top * height / h, (left + size) * width / w, (top + size) * height / h


def preprocessing(config: CLIPConfig) -> Callable[[Image.Image], Tensor]:
    """`preprocess` with the conventions of a model."""
    how = config.conventions
    return partial(
        preprocess,
        size=config.image_size,
        resize=how.image_resize,
        interpolation=how.image_interpolation,
        fill=how.image_fill,
    )


def random_view(data: bytes, size: int, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Bytes of an image -> its random resized crop (bicubic), uint8 [3, size, size].

    The crop's area is a fraction of the image drawn from [config.crop_scale, 1], its aspect ratio 3/4 to 4/3; at 1 it
    is the largest central square. A crop that would be upscaled, of an image that is large enough, is replaced by an
    unscaled window of the image, except with probability config.upscale_crops: otherwise only evaluation images would
    be sharp. Raises SampleError as `decode` does.
    """
    image = _open(data)
    if _is_plain_jpeg(image):
        box = _draw_box(*image.size, config.crop_scale, rng)
        pixels, scale = _decode_reduced(image, min(box[2:]) // size)
    else:
        pixels, scale = to_pixels(_finish(image)), 1.0
        box = _draw_box(pixels.shape[2], pixels.shape[1], config.crop_scale, rng)
    if min(box[2:]) < size <= min(pixels.shape[1:]) and not (
        config.upscale_crops and rng.random() < config.upscale_crops
    ):
        return _window(pixels, size, config.crop_scale, rng)
    left, top, width, height = (int(n * scale) for n in box)
    return _resized(pixels, (left, top, max(1, width), max(1, height)), size)


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and orientation_of(image) == 1


def _decode_reduced(image: Image.Image, most: int) -> tuple[Tensor, float]:
    """Pixels [3, h, w] of a JPEG at 1/8, 1/4, 1/2 or all of its size, not below 1/most of it, and the scale."""
    width = image.width
    _reduce(image, most)
    pixels = to_pixels(_finish(image))
    return pixels, pixels.shape[2] / width


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def _draw_box(width: int, height: int, smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of the crop, in integer pixels."""
    if smallest == 1:
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
    area = rng.uniform(smallest, 1.0) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = max(1, min(width, round(math.sqrt(area * ratio))))
    h = max(1, min(height, round(math.sqrt(area / ratio))))
    return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def _window(pixels: Tensor, size: int, smallest: float, rng: np.random.Generator) -> Tensor:
    """An unscaled window of [3, H, W], which may extend beyond the edges, where the image is mirrored.

    At most by the margin of the smallest central crop, and by an eighth of `size`.
    """
    edge = min(size // 8, round(size * (1 - math.sqrt(smallest)) / 2))
    height, width = pixels.shape[1:]
    top, left = (int(rng.integers(-edge, n - size + edge + 1)) for n in (height, width))
    rows, columns = (_mirrored(torch.arange(start, start + size), n) for start, n in ((top, height), (left, width)))
    return pixels[:, rows[:, None], columns]


def _mirrored(index: Tensor, n: int) -> Tensor:
    """Indices reflected at 0 and n - 1."""
    return (n - 1) - ((n - 1) - index.abs()).abs()


def _resized(pixels: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    left, top, width, height = box
    crop = pixels[:, top : top + height, left : left + width]
    if (width, height) == (size, size):
        return crop
    # torch's vectorised uint8 kernel needs channels_last.
    crop = crop[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]


def flip_and_jitter(
    images: Tensor, config: DataConfig, rngs: list[np.random.Generator], captions: Sequence[str] = ()
) -> Tensor:
    """uint8 [B, 3, S, S] -> the same shape, each flipped and jittered by its own generator.

    An image whose caption says left or right is not flipped.
    """
    if config.flip and rngs:
        flipped = torch.tensor([rng.random() < 0.5 for rng in rngs])
        if captions:
            flipped &= ~torch.tensor([bool(_SIDED.search(caption)) for caption in captions])
        images[flipped] = images[flipped].flip(-1)
    if config.colour_jitter and rngs:
        j = config.colour_jitter
        factors = torch.tensor(np.stack([rng.uniform(1 - j, 1 + j, 3) for rng in rngs]), dtype=torch.float32)
        images = _jitter(images.float(), factors).to(torch.uint8)
    if config.sharpness_jitter and rngs:
        j = config.sharpness_jitter
        sharpness = torch.tensor([rng.uniform(1 - j, 1 + j) for rng in rngs], dtype=torch.float32)
        images = _sharpened(images.float(), sharpness).to(torch.uint8)
    return images


_SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def _jitter(x: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of [B, 3, S, S] in 0 to 255, scaled by the columns of `factors` [B, 3]."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # each [B, 1, 1, 1]
    to_grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    x = (x * brightness).clamp(0, 255)
    mean = (x * to_grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)  # [B, 1, 1, 1]
    x = (mean + contrast * (x - mean)).clamp(0, 255)
    grey = (x * to_grey).sum(1, keepdim=True)  # [B, 1, S, S]
    return (grey + saturation * (x - grey)).clamp(0, 255).round()


def _sharpened(x: Tensor, factors: Tensor) -> Tensor:
    """Sharpness of [B, 3, S, S] in 0 to 255 scaled by `factors` [B]; the blur is Pillow's SMOOTH."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    smooth = F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
    return (smooth + factors[:, None, None, None] * (x - smooth)).clamp(0, 255).round()


def to_image(tensor: Tensor) -> Image.Image:
    """Float tensor [3, H, W] in [-1, 1] (clamped) -> RGB image."""
    pixels = ((tensor.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255], uint8 or float -> float32 in [-1, 1], the range of denoisers and autoencoders."""
    return pixels.float() / 127.5 - 1


def to_unit(signed: Tensor) -> Tensor:
    """Floats in [-1, 1] -> [0, 1], the range of CLIP's image encoders."""
    return (signed + 1) / 2
