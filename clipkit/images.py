"""The one place that touches untrusted image bytes: limits, decoding, and the transforms of training and evaluation.

Only JPEG, PNG and WebP are opened; the size is checked in the header before a pixel is decoded. Images leave here as
uint8; the model normalises them on its own device.
"""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from clipkit.config import DataConfig
from clipkit.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000

# What Pillow raises on damaged bytes: it has no base class for it, and decoders differ.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, Warning)


def decode(data: bytes) -> Image.Image:
    """Bytes of a JPEG, PNG or WebP -> RGB image, upright (EXIF), transparency laid on white.

    Raises SampleError: "not an image", "too many pixels" or "damaged image".
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _DECODE_ERRORS as error:
        raise SampleError("not an image", f"no readable {', '.join(FORMATS)} header in {len(data)} bytes") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleError("too many pixels", f"{image.width}x{image.height} is over the limit of {MAX_PIXELS}")
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if "exif" in image.info else image)
    except _DECODE_ERRORS as error:
        raise SampleError("damaged image", str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB; what is transparent becomes white, 16-bit greys keep their range."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layered)
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess(image: Image.Image, size: int) -> Tensor:
    """Evaluation transform: shorter side to `size` (bicubic), centre crop -> uint8 [3, size, size]."""
    image = to_rgb(image)
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return to_tensor([image])[0].contiguous()


def augment(image: Image.Image, size: int, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    """Training transform -> size x size: random resized crop (ratio 3/4 to 4/3), flip, jitter, as `config` says."""
    width, height = image.size
    w = h = float(min(width, height))
    place_x = place_y = 0.5
    if config.crop_scale < 1:
        area = rng.uniform(config.crop_scale, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        place_x, place_y = rng.random(2).tolist()
    left, top = place_x * (width - w), place_y * (height - h)
    if (w, h) != (size, size) or image.size != (size, size):
        box = (left, top, left + w, top + h)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.colour_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(1 - config.colour_jitter, 1 + config.colour_jitter))
    return image


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size -> uint8 [B, 3, H, W], in memory channels last as the decoder left them."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def to_image(tensor: Tensor) -> Image.Image:
    """Float tensor [3, H, W] in [-1, 1] (clamped) -> RGB image."""
    pixels = ((tensor.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
