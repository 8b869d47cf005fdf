import io

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit import images
from clipkit.config import DataConfig
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


def test_refuses_a_cut_image():
    data = encoded(noise(size=(200, 200)), "JPEG")
    with pytest.raises(SampleError, match="damaged image"):
        images.decode(data[: len(data) // 2])


def test_refuses_a_bomb_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(SampleError, match="40x30 is over the limit"):
        images.decode(encoded(noise()))


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


def test_preprocess_is_pillow_resize_and_centre_crop():
    image = noise(size=(60, 40))
    expected = image.resize((20, 20), Image.Resampling.BICUBIC, box=(10, 0, 50, 40), reducing_gap=3.0)
    assert torch.equal(images.preprocess(image, 20), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def augmented(image, seed, **varied):
    return images.augment(image, 16, DataConfig("", **varied), np.random.default_rng(seed))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
def test_extreme_shapes(size):
    assert images.preprocess(noise(size=size), 16).shape == (3, 16, 16)
    assert augmented(noise(size=size), 0, crop_scale=0.5, flip=True).size == (16, 16)


def test_augment_is_a_function_of_its_generator():
    varied = {"crop_scale": 0.4, "flip": True, "colour_jitter": 0.3}
    first, second = (augmented(noise(), 7, **varied) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != augmented(noise(), 8, **varied).tobytes()


def test_without_crop_an_image_of_the_right_size_is_untouched():
    image = noise(size=(16, 16))
    assert augmented(image, 0).tobytes() == image.tobytes()


def test_to_image_inverts_the_scale_of_training():
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    back = np.asarray(images.to_image(pixels.float() / 127.5 - 1))
    assert np.array_equal(back, pixels.permute(1, 2, 0).numpy())


def test_jitter_changes_colours_and_nothing_else():
    """Grey stays grey under saturation; a brighter or darker picture has its edges where they were."""
    image = Image.new("RGB", (16, 16), (90, 90, 90))
    image.paste((30, 30, 30), (0, 0, 8, 16))
    seen = np.stack([np.asarray(augmented(image, seed, colour_jitter=0.4)) for seed in range(20)])
    assert (seen == seen[..., :1]).all()
    assert (seen[:, :, 0] < seen[:, :, 15]).all()
    assert len({int(v) for v in seen[:, 0, 15, 0]}) > 10
