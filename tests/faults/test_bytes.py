"""Damaged shards, mutated images, bombs, hostile captions: rows 10 to 12 and 14 of docs/reliability.md."""

import contextlib
import io
import random
import resource
import string
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipkit.config import DataConfig
from clipkit.data.captions import clean_caption
from clipkit.data.images import decode, preprocess, random_view
from clipkit.data.tar_scan import scan
from clipkit.errors import SampleError, ShardError
from clipkit.models.tokenizer import Tokenizer


def test_no_cut_of_a_shard_is_silent(packs, tmp_path, times):
    """Either every sample is still there, or the damage is reported."""
    whole = (packs / "heldout" / "shard-000000.tar").read_bytes()
    expected, cut = scan(packs / "heldout" / "shard-000000.tar").offsets, tmp_path / "cut.tar"
    chance = random.Random(0)
    points = {*range(0, len(whole), 512)} if times(0, 1) else set()
    points |= {len(whole) - n for n in (1, 511, 512, 513, 1023, 1024, 1025, 10240)}
    while len(points) < times(200, 0):
        points.add(chance.choice([512 * chance.randrange(len(whole) // 512), chance.randrange(len(whole))]))
    found = 0
    for size in sorted(points):
        cut.write_bytes(whole[:size])
        try:
            assert np.array_equal(scan(cut).offsets, expected), f"silent loss when cut to {size} bytes"
        except ShardError:
            found += 1
    assert found > 0.9 * len(points)


def test_no_bit_flip_in_a_header_is_silent(packs, tmp_path, times):
    path = packs / "heldout" / "shard-000000.tar"
    whole, expected = bytearray(path.read_bytes()), scan(path).offsets
    headers = [int(o) - 512 for o in expected[:, ::2].flatten() if o >= 0]
    extended = [at for at in range(0, len(whole), 512) if whole[at + 156 : at + 157] == b"x"]
    headers += [at + block for at in extended for block in (0, 512)]  # of what extends another, the text too
    flipped, chance = tmp_path / "flipped.tar", random.Random(0)
    flipped.write_bytes(whole)
    with flipped.open("r+b") as file:
        for _ in range(times(300, 10_000)):
            position = chance.choice(headers) + chance.randrange(512)
            file.seek(position)
            file.write(bytes([whole[position] ^ (1 << chance.randrange(8))]))
            file.flush()
            with contextlib.suppress(ShardError):
                assert np.array_equal(scan(flipped).offsets, expected), f"silent change at byte {position}"
            file.seek(position)
            file.write(whole[position : position + 1])


def _encoded():
    ramp = np.linspace(0, 255, 90).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 60, (70, 90, 3))
    image = Image.fromarray((np.tile(ramp, (70, 1))[..., None] * 0.7 + noise).astype(np.uint8))
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        yield buffer.getvalue()


def _mutated(data: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        kind, at = chance.randrange(5), chance.randrange(len(spoiled))
        if kind == 0:
            spoiled[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            spoiled[at] = chance.randrange(256)
        elif kind == 2:
            del spoiled[at : at + chance.randrange(1, 32)]
        elif kind == 3:
            spoiled[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 32)))
        else:  # a header's number becomes a large one
            spoiled[at : at + 4] = b"\x7f\xff\xff\xff"[: chance.choice([2, 4])]
        if not spoiled:
            return b""
    return bytes(spoiled)


@pytest.mark.filterwarnings("ignore")
def test_mutated_images_are_decoded_or_counted_and_never_more(times):
    images, chance, config = list(_encoded()), random.Random(0), DataConfig("", crop_scale=0.5)
    outcomes = {"decoded": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(times(300, 20_000)):
        data = _mutated(images[i % len(images)], chance)
        for read in (decode, lambda d, i=i: random_view(d, 16, config, np.random.default_rng(i))):
            try:
                read(data)
                outcomes["decoded"] += 1
            except SampleError as error:
                outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
    assert len(outcomes) >= 3
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 600 << 10  # KiB: three times 50 megapixels


def _with_metadata(exif: bytes, xmp: bytes):
    """The same picture, 30 wide and 20 high, in each format with these blocks beside it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode("latin-1"))
    for kind, options in (("JPEG", {"xmp": xmp}), ("PNG", {"pnginfo": text}), ("WEBP", {"xmp": xmp})):
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif, **options)
        yield buffer.getvalue()


def test_mutated_exif_and_xmp_cost_no_picture(times):
    """No pixel is lost, no warning raised: the picture is upright, or as it lies in the file."""
    tags = Image.Exif()
    tags.update({0x112: 6, 0x10F: "Make", 0x110: "Model", 0x11A: 72.0, 0x128: 2, 0x132: "2026:01:01 00:00:00"})
    tags.get_ifd(0x8769)[0x9000] = b"0232"
    tags.get_ifd(0x8825)[2] = (48.0, 8.0, 30.5)
    exif, xmp = tags.tobytes(), b'<x:xmpmeta><rdf:Description tiff:Orientation="8" tiff:Make="A"/></x:xmpmeta>'
    lying = [np.sort(np.asarray(decode(data)), axis=None) for data in _with_metadata(b"", b"")]
    chance, config, sizes = random.Random(0), DataConfig(""), set()
    for i in range(times(300, 20_000)):
        spoiled = exif[:6] + _mutated(exif[6:], chance) if i % 4 else exif[:6]
        for data, expected in zip(_with_metadata(spoiled, _mutated(xmp, chance)), lying, strict=True):
            image = decode(data)
            sizes.add(image.size)
            assert np.array_equal(np.sort(np.asarray(image), axis=None), expected)
            assert random_view(data, 8, config, np.random.default_rng(i)).shape == (3, 8, 8)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    opened = Image.open(io.BytesIO(data))
            except OSError:  # Pillow by itself loses some of them
                continue
            assert torch.equal(preprocess(opened, 8), preprocess(image, 8))
    assert sizes == {(30, 20), (20, 30)}


def _png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    squeezer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    pixels = b"".join(squeezer.compress(row) for _ in range(side)) + squeezer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _jpeg_bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb", [_png_bomb(12_000), _png_bomb(30_000), _jpeg_bomb(20_000)], ids=["17K", "107K", "jpeg"]
)
def test_a_bomb_is_refused_from_its_header(bomb):
    assert len(bomb) < 150_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (decode, lambda d: random_view(d, 224, DataConfig(""), np.random.default_rng(0))):
        with pytest.raises(SampleError, match="too many pixels"):
            read(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


_tokenizer = Tokenizer.train(["a photo of a red car", "one blue boat", "the end", *string.ascii_lowercase], 400)
_pieces = st.sampled_from(
    [
        "<|endoftext|>",
        "<|startoftext|>",
        "<end>",
        "</w>",
        "\x00",
        "\ud800",
        "\udfff",
        "\ufeff",
        "a photo",
        "é",
        "🚀",
        "\u202e",
    ]
)
_captions = st.one_of(st.text(st.characters(), max_size=200), st.lists(_pieces, max_size=40).map("".join))


def _check_caption(text):
    caption = clean_caption(text)
    ids = _tokenizer([caption])
    ends = (ids[0] == _tokenizer.end_id).nonzero().flatten().tolist()
    assert ends == [ids.shape[1] - 1]  # one end, at the end: what a caption says cannot move it
    assert ids.shape[1] <= _tokenizer.context_length


def test_hostile_captions_become_ids_with_one_end(times):
    settings(max_examples=times(500, 10_000), deadline=None, suppress_health_check=list(HealthCheck))(
        given(_captions)(_check_caption)
    )()


@pytest.mark.parametrize("text", ["", "   ", "a" * 1_000_000, "word " * 300_000, "\x00" * 5000, "🚀" * 100_000])
def test_long_and_empty_captions(text):
    _check_caption(text)
