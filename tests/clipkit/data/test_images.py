import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from clipkit.config import DataConfig
from clipkit.data import images
from clipkit.errors import SampleError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode="RGB", size=(40, 30)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_opens_the_three_formats(kind):
    image = images.decode(encoded(noise(), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_refuses_others(kind):
    with pytest.raises(SampleError, match="not an image"):
        images.decode(encoded(noise(), kind))


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_refuses_what_is_no_image(data):
    with pytest.raises(SampleError, match="not an image"):
        images.decode(data)


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


@pytest.mark.parametrize(
    "beside",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * (4 << 20))),
        chunk(b"tEXt", b"Comment\0cut", checksum=7),
        chunk(b"eXIf", b"II*", checksum=7),
        chunk(b"iCCP", b"name\0\0no zlib"),
        chunk(b"gAMA", b""),
    ],
    ids=["large text", "large XMP", "checksum of a text", "checksum of EXIF", "profile", "no gamma"],
)
def test_odd_chunks_cost_no_png(beside):
    image, exif = noise("RGBA"), Image.Exif()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif[0x0112] = 6
    data = encoded(image, exif=exif)
    assert np.array_equal(images.decode(data[:33] + beside + data[33:]), images.decode(data))  # after the header


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0" + b"\xff" * 9),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
        (0xE1, b""),
        (0xFE, b"\xff\xff"),
    ],
)
def test_odd_segments_cost_no_jpeg(marker, content):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), "JPEG", exif=exif)
    odd = data[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content + data[2:]
    assert np.array_equal(images.decode(odd), images.decode(data))


def test_refuses_a_cut_image():
    data = encoded(noise(size=(200, 200)), "JPEG")
    with pytest.raises(SampleError, match="damaged image"):
        images.decode(data[: len(data) // 2])


def test_refuses_a_bomb_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(SampleError, match="40x30 is over the limit"):
        images.decode(encoded(noise()))


@pytest.mark.parametrize(
    ("asked", "size"), [(0, (80, 120)), (61, (80, 120)), (40, (40, 60)), (39, (40, 60)), (10, (10, 15))]
)
def test_a_jpeg_is_reduced_while_decoding_and_turned_then(asked, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(size=(120, 80)), "JPEG", exif=exif)
    assert images.decode(data, reduce_to=asked).size == size
    assert images.decode(encoded(noise(size=(120, 80))), reduce_to=asked).size == (120, 80)


def test_a_lower_limit_counts_the_pixels_that_are_decoded():
    jpeg, png = encoded(noise(size=(80, 80)), "JPEG"), encoded(noise(size=(80, 80)))
    assert images.decode(jpeg, reduce_to=20, max_pixels=400).size == (20, 20)
    for data, reduce_to in ((jpeg, 0), (png, 20)):
        with pytest.raises(SampleError, match="80x80 is over the limit of 400"):
            images.decode(data, reduce_to, max_pixels=400)
    with pytest.raises(SampleError, match="40x40 is over the limit of 400"):
        images.decode(jpeg, reduce_to=40, max_pixels=400)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert images.decode(encoded(noise(mode), kind)).mode == "RGB"


def test_sixteen_bits_keep_their_range():
    grey = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    pixels = np.asarray(images.decode(encoded(grey)))
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert images.decode(encoded(image)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(encoded(noise(), "JPEG", exif=exif)).size == (30, 40)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (47, 131), (20, 20), (7, 9), (640, 427)])
def test_preprocess_is_torchvisions_resize_and_centre_crop(size):
    image = noise(size=size)
    transforms = pytest.importorskip("torchvision.transforms.v2")
    for interpolation in ("bicubic", "bilinear"):
        mode = transforms.InterpolationMode(interpolation)
        wanted = transforms.CenterCrop(20)(transforms.Resize(20, mode)(image))
        found = images.preprocess(image, 20, "crop", interpolation)
        assert (found.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1)).abs().max() <= 1
    squashed = transforms.Resize((20, 20), transforms.InterpolationMode.BICUBIC)(image)
    found = images.preprocess(image, 20, "squash")
    assert torch.equal(found, torch.from_numpy(np.array(squashed)).permute(2, 0, 1))


def view(data, seed=0, size=16, **varied):
    return images.random_view(data, size, DataConfig("", **varied), np.random.default_rng(seed))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2), (1, 20_000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_extreme_shapes(size, kind):
    data = encoded(noise(size=size), kind)
    assert images.preprocess(images.decode(data), 16).shape == (3, 16, 16)
    for seed in range(5):
        assert view(data, seed, crop_scale=0.3).shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_view_is_a_function_of_its_generator(kind):
    data = encoded(noise(), kind)
    first, second = (view(data, 7, crop_scale=0.4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, view(data, 8, crop_scale=0.4))


def test_without_crop_an_image_of_the_right_size_is_untouched():
    image = noise(size=(16, 16))
    assert torch.equal(view(encoded(image)), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [16, 24, 32])
def test_crops_that_would_be_enlarged_are_windows_as_sharp_as_the_picture(size, monkeypatch):
    """Every other view is a window of the picture mirrored at its edges, and none of them was resized."""
    picture, enlarged = noise(size=(40, 32)), []
    monkeypatch.setattr(images.F, "interpolate", lambda crop, **options: enlarged.append(crop.shape[2:]) or crop)
    monkeypatch.setattr(images, "_draw_box", lambda w, h, smallest, rng: (0, 0, *rng.integers(1, 33, 2)))
    edge = size // 8
    mirrored = np.pad(np.array(picture), ((edge, edge), (edge, edge), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, (size, size), (0, 1))  # [y, x, 3, S, S]
    known = {window.tobytes(): (y, x) for y, row in enumerate(windows) for x, window in enumerate(row)}
    views = [view(encoded(picture), seed, size=size, crop_scale=0.05) for seed in range(300)]
    assert all(min(sides) >= size for sides in enlarged)
    places = [known[v.numpy().tobytes()] for v in views if v.shape == (3, size, size)]
    assert len(places) + len(enlarged) >= 300
    assert len({y for y, _ in places}) == windows.shape[0]
    assert len({x for _, x in places}) == windows.shape[1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("smallest", "edge"), [(0.9, 1), (0.7, 2), (0.3, 3), (0.01, 3)])
def test_windows_move_as_far_as_the_crops_do(smallest, edge, kind):
    """Of 24 pixels a crop of 0.9 of the area stays 0.6 within each edge, one of 0.3 stays 5; an eighth is 3."""
    data = encoded(noise(size=(24, 24)), kind)
    mirrored = np.pad(np.array(images.decode(data)), ((edge, edge), (edge, edge), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, (24, 24), (0, 1)).reshape(-1, 3, 24, 24)
    seen = {view(data, seed, size=24, crop_scale=smallest).numpy().tobytes() for seed in range(400)}
    assert seen == {window.tobytes() for window in windows}


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 165, 225), (1.0, 380, 400)])
def test_a_share_of_the_small_crops_is_enlarged(share, least, most, monkeypatch):
    enlarged, resize = [], images._resized
    monkeypatch.setattr(images, "_resized", lambda *a: enlarged.append(min(a[1][2:]) < 32) or resize(*a))
    data = encoded(noise(size=(32, 32)))
    for seed in range(400):
        assert view(data, seed, size=32, crop_scale=0.3, upscale_crops=share).shape == (3, 32, 32)
    assert least <= sum(enlarged) <= most


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_that_evaluation_enlarges_too_are_enlarged(kind, monkeypatch):
    monkeypatch.setattr(images, "_window", None)
    for seed in range(20):
        assert view(encoded(noise(size=(30, 40)), kind), seed, size=32, crop_scale=0.3).shape == (3, 32, 32)


@pytest.mark.parametrize(("size", "reduced"), [(300, 1), (500, 2), (1000, 4), (2000, 8)])
def test_both_decoders_show_the_same_view(size, reduced):
    """A smooth picture: the crop from the JPEG's own scaling is that of the whole picture, to rounding."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), 255 - np.tile(ramp, (size, 1))], -1)
    )
    jpeg, png = encoded(image, "JPEG", quality=95, subsampling=0), encoded(image)
    for seed in range(4):
        a, b = (view(data, seed, size=224, crop_scale=0.9).float() for data in (jpeg, png))
        assert (a - b).abs().mean() < 2, reduced


def test_a_jpeg_turned_by_its_exif_is_seen_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(size=(40, 20))
    turned = view(encoded(image, "JPEG", exif=exif, quality=95), size=20)
    upright = view(encoded(image.rotate(-90, expand=True), "JPEG", quality=95), size=20)
    assert (turned.float() - upright.float()).abs().mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_views_of_other_jpegs_are_rgb(mode):
    assert view(encoded(noise(mode), "JPEG"), crop_scale=0.5).shape == (3, 16, 16)


def test_a_cut_jpeg_has_no_view():
    data = encoded(noise(size=(200, 200)), "JPEG")
    for size in (16, 150):  # through Pillow's scaled decoding, through torchvision
        with pytest.raises(SampleError, match="damaged image"):
            view(data[: len(data) // 2], size=size)


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert images.decode(data).getpixel((0, 0)) == (255, 0, 0)


def test_to_image_inverts_the_scale_of_training():
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    back = np.asarray(images.to_image(pixels.float() / 127.5 - 1))
    assert np.array_equal(back, pixels.permute(1, 2, 0).numpy())


def varied(pixels, seeds, **config):
    return images.flip_and_jitter(pixels.clone(), DataConfig("", **config), [np.random.default_rng(s) for s in seeds])


def test_half_are_flipped_and_each_by_its_own_generator():
    pixels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    together = varied(pixels, range(40), flip=True)
    flipped = [torch.equal(t, p.flip(-1)) for t, p in zip(together, pixels, strict=True)]
    assert all(f or torch.equal(t, p) for f, t, p in zip(flipped, together, pixels, strict=True))
    assert 10 < sum(flipped) < 30
    assert torch.equal(varied(pixels[7:8], [7], flip=True)[0], together[7])


def test_what_is_left_stays_left():
    pixels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    rngs = [np.random.default_rng(i) for i in range(40)]
    captions = ["a red rocket left of a star", "A cup on the Right.", "a leftover", "a rocket"] * 10
    found = images.flip_and_jitter(pixels.clone(), DataConfig("", flip=True), rngs, captions)
    flipped = [torch.equal(t, p.flip(-1)) for t, p in zip(found, pixels, strict=True)]
    assert not any(flipped[0::4])
    assert not any(flipped[1::4])
    assert any(flipped[2::4])
    assert any(flipped[3::4])


def test_jitter_is_that_of_torchvision():
    from torchvision.transforms.v2 import functional as F

    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    found = varied(pixels, range(4), colour_jitter=0.4)
    for i in range(4):
        brightness, contrast, saturation = np.random.default_rng(i).uniform(0.6, 1.4, 3)
        x = F.adjust_brightness(pixels[i].float() / 255, brightness)
        expected = F.adjust_saturation(F.adjust_contrast(x, contrast), saturation) * 255
        assert (found[i].float() - expected).abs().max() < 1


def test_sharpness_is_that_of_pillow():
    """But for the outermost pixels, which Pillow does not smooth; and what is flat stays flat there."""
    pixels = torch.randint(0, 256, (8, 3, 9, 12), dtype=torch.uint8)
    found = varied(pixels, range(8), sharpness_jitter=1.0)
    for i in range(8):
        factor = np.random.default_rng(i).uniform(0, 2)
        expected = ImageEnhance.Sharpness(Image.fromarray(pixels[i].permute(1, 2, 0).numpy())).enhance(factor)
        theirs = torch.from_numpy(np.array(expected)).permute(2, 0, 1)[:, 1:-1, 1:-1]
        assert (found[i, :, 1:-1, 1:-1].int() - theirs.int()).abs().max() <= 1
    flat = torch.full((1, 3, 5, 5), 77, dtype=torch.uint8)
    assert torch.equal(varied(flat, [3], sharpness_jitter=1.0), flat)


def test_nothing_to_vary():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(varied(pixels, range(2)), pixels)
    assert varied(pixels[:0], [], flip=True, colour_jitter=0.5, sharpness_jitter=0.5).shape == (0, 3, 4, 4)


def test_pixel_ranges():
    pixels = torch.arange(256, dtype=torch.uint8)
    signed = images.to_signed(pixels)
    assert torch.equal(signed, pixels.float() / 127.5 - 1)
    assert (float(signed.min()), float(signed.max())) == (-1, 1)
    assert torch.equal(images.to_unit(signed), (signed + 1) / 2)
    torch.testing.assert_close(images.to_unit(signed), pixels / 255)
