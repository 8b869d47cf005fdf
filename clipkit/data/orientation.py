"""Which way up a picture is: the orientation tag of its EXIF, or of its XMP where EXIF has none.

Only the orientation tag is read. Pillow's `exif_transpose` parses and re-encodes the whole block, so that one odd entry
loses the image. An unreadable tag counts as upright, since the pixels are sound.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF, _XMP = ("exif",), ("xmp", "XML:com.adobe.xmp")
_PROFILES = ("Raw profile type exif", "Raw profile type APP1", "Raw profile type xmp")
"""Where ImageMagick and exiftool put both in a PNG: text chunks of a name, a length and hexadecimal digits."""
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


def upright(image: Image.Image) -> Image.Image:
    """The image turned by its orientation metadata, which are then removed; the same image if it has none."""
    image.load()  # a PNG may have its EXIF behind the pixels
    method = _TRANSPOSE.get(orientation_of(image))
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {k: v for k, v in turned.info.items() if k not in (*_EXIF, *_XMP, *_PROFILES)}
    return turned


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none."""
    blocks = [image.info[key] for key in (*_EXIF, *_XMP) if key in image.info]
    blocks += [_profile(image.info[key]) for key in _PROFILES if key in image.info]
    blocks = [block.encode("utf-8", "replace") if isinstance(block, str) else block for block in blocks]
    blocks = [block for block in blocks if isinstance(block, bytes)]
    return next((n for read in (_from_exif, _from_xmp) for n in map(read, blocks) if n), 1)


def _profile(text: object) -> bytes:
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:]))
    except ValueError:
        return b""


def _from_exif(block: bytes) -> int:
    """The tag in the first directory of a TIFF structure; 0 when there is none, or no structure."""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 0
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, at)
            if tag == 0x0112 and count == 1 and kind in _INTEGERS:
                value = int(struct.unpack_from(order + _INTEGERS[kind], block, at + 8)[0])
                return value if 1 <= value <= 8 else 0
    except struct.error:
        pass
    return 0


def _from_xmp(block: bytes) -> int:
    found = _IN_XMP.search(block)
    return int(found[1]) if found else 0
