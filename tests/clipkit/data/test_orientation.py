import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import clipkit
from clipkit.data.images import decode, preprocess
from clipkit.data.orientation import orientation_of, upright

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
ATTRIBUTE = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Make="A" tiff:Orientation="{}"/></x:xmpmeta>'
ELEMENT = "<x:xmpmeta><rdf:Description><tiff:Orientation>\n {} </tiff:Orientation></rdf:Description></x:xmpmeta>"


def encoded(kind="PNG", picture=PICTURE, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **{"lossless": True} if kind == "WEBP" else {}, **options)
    return buffer.getvalue()


def block(*entries, order="<", head=b"Exif\0\0"):
    """EXIF with these entries (tag, type, count, value) in its first directory, the values as they stand."""
    rows = b"".join(struct.pack(f"{order}HHI", *e[:3]) + e[3].ljust(4, b"\0") for e in entries)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return head + magic + struct.pack(f"{order}IH", 8, len(entries)) + rows + bytes(4)


def turned_by(n, order="<", **more):
    return block((0x112, 3, 1, struct.pack(f"{order}H", n)), order=order, **more)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("n", range(1, 9))
def test_every_orientation_of_every_format_is_turned_as_pillow_turns_it(n, order, kind):
    data = encoded(kind, exif=turned_by(n, order))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("xmp", [ATTRIBUTE, ELEMENT, ATTRIBUTE.replace('"', "'"), "\ufeff" + ELEMENT])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_xmp_counts_where_exif_says_nothing(kind, xmp):
    def data(n, **more):
        if kind != "PNG":
            return encoded(kind, xmp=xmp.format(n).encode(), **more)
        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.format(n))
        return encoded(kind, pnginfo=chunks, **more)

    assert decode(data(6)).size == (20, 30)
    assert decode(data(6, exif=block((0x10F, 2, 1, b"A")))).size == (20, 30)
    assert decode(data(6, exif=turned_by(1))).size == (30, 20)
    assert decode(data(9)).size == (30, 20)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("exif", turned_by(6)),
        ("APP1", turned_by(6)),
        ("APP1", b"http://ns.adobe.com/xap/1.0/\0" + ATTRIBUTE.format(6).encode()),
        ("xmp", ELEMENT.format(6).encode()),
    ],
)
def test_profiles_in_the_text_of_a_png(name, content):
    chunks = PngInfo()
    digits = "\n".join(content.hex()[i : i + 72] for i in range(0, 2 * len(content), 72))
    chunks.add_text(f"Raw profile type {name}", f"\n{name}\n{len(content):8}\n{digits}\n", zip=True)
    assert decode(encoded(pnginfo=chunks)).size == (20, 30)
    chunks.add_text(f"Raw profile type {name}", f"\n{name}\n{len(content):8}\nno digits\n")
    assert decode(encoded(pnginfo=chunks)).size == (30, 20)


def test_exif_behind_the_pixels_of_a_png():
    data, exif = encoded(), turned_by(6)[6:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    assert decode(data[:-12] + chunk + data[-12:]).size == (20, 30)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        turned_by(0),
        turned_by(9),
        turned_by(6)[:-8],
        turned_by(6, head=b"Exif\0\0").replace(b"II*\0", b"II+\0"),
        block((0x112, 3, 3, struct.pack("<H", 6))),
        block((0x112, 5, 1, struct.pack("<I", 6))),
        block((0x112, 2, 1, b"6")),
        b"Exif\0\0II*\0" + b"\xff" * 6,
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65535) + bytes(24),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_cannot_be_read_turns_nothing_and_costs_nothing(kind, exif):
    """Without a warning, too: here each is an error."""
    assert np.array_equal(decode(encoded(kind, exif=exif)), decode(encoded(kind)))


@pytest.mark.parametrize("odd", [(0x10F, 5, 1, b"\1\0\0\0"), (0x10F, 3, 1, b"A"), (0x8769, 2, 99, b"\xff" * 4)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_odd_entries_beside_the_tag_do_not_matter(kind, odd):
    assert decode(encoded(kind, exif=block(odd, (0x112, 4, 1, struct.pack("<I", 8))))).size == (20, 30)


@given(st.binary(max_size=80), st.sampled_from([b"", b"Exif\0\0II*\0", b"Exif\0\0MM\0*", b"II*\0\x08\0\0\0"]))
def test_any_bytes_have_an_orientation(tail, head):
    image = Image.new("RGB", (3, 2))
    image.info = {"exif": head + tail, "xmp": tail, "Raw profile type exif": tail.decode("latin-1")}
    assert 1 <= orientation_of(image) <= 8
    assert upright(image).size in ((3, 2), (2, 3))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), *(("PNG", m) for m in ("RGB", "L", "P", "RGBA", "LA", "1")), ("WEBP", "RGBA")],
)
def test_an_opened_picture_is_preprocessed_as_its_bytes_are(kind, mode):
    data, clip = encoded(kind, PICTURE.convert(mode), exif=turned_by(6)), clipkit.load(device="cpu")
    with Image.open(io.BytesIO(data)) as image:
        seen = clip.preprocess(image)
        assert torch.equal(seen, clip.preprocess(image.copy()))  # a copy says the same
        assert image.size == (30, 20)  # and the caller's own is as it was
    assert torch.equal(seen, clip.preprocess(decode(data)))
    assert torch.equal(seen, clip.preprocess(Image.fromarray(np.asarray(decode(data)))))


def test_what_was_turned_is_not_turned_again():
    data = encoded("JPEG", exif=turned_by(3), xmp=ATTRIBUTE.format(3).encode())
    once = decode(data)
    assert np.array_equal(upright(once), once)
    assert np.array_equal(decode(encoded("PNG", once)), once)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert torch.equal(preprocess(theirs, 16), preprocess(once, 16))
