import json

import pytest
import torch
from PIL import Image

from clipkit.errors import UsageError
from clipkit.guidance.draw import Studio, alternatives, grid, save_gif, save_grid


@pytest.fixture(scope="module")
def studio(chain):
    return Studio.open(chain, "cpu")


def test_the_same_seed_gives_the_same_bytes(studio, tmp_path):
    for name in ("a", "b"):
        save_grid(studio.draw("a red rocket", n=2, steps=3, seed=5), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_scale_zero_is_unguided_bit_for_bit(studio, monkeypatch):
    at_zero = studio.draw("a red rocket", n=2, steps=3, scale=0, seed=1).images
    monkeypatch.setattr(Studio, "guided", lambda self, prompt, negative, scale: self.denoiser)
    assert torch.equal(studio.draw("a red rocket", n=2, steps=3, seed=1).images, at_zero)


def test_guidance_and_negatives_change_the_picture(studio):
    def images(*arguments, **options):
        return studio.draw(*arguments, n=2, steps=4, **options).images

    plain, guided = images("a cat", scale=0), images("a cat", scale=5)
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, images("a cat", scale=5, negative=["a red cat"]))


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddim", "ddpm"])
def test_every_sampler_draws(studio, sampler):
    drawn = studio.draw("a cat", n=3, steps=3, sampler=sampler)
    assert drawn.images.shape == (3, 3, 24, 24)
    assert drawn.images.abs().max() <= 1
    assert len(drawn.trajectory) == 3
    assert len(drawn.scores) == 3


def test_metadata_and_animation(studio, tmp_path):
    drawn = studio.draw("a cat", n=4, steps=3, seed=9, negative=["a dog"])
    save_grid(drawn, tmp_path / "deep" / "grid.png")
    save_gif(drawn, tmp_path / "grid.gif")
    with Image.open(tmp_path / "deep" / "grid.png") as sheet:
        text = sheet.text
    assert text["prompt"] == "a cat"
    assert json.loads(text["seed"]) == 9
    assert json.loads(text["negative"]) == ["a dog"]
    assert {"scale", "clipkit", "sampler", "steps"} <= text.keys()
    with Image.open(tmp_path / "grid.gif") as animation:
        assert animation.n_frames == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("  ", {}, "the prompt is empty"),
        ("a cat", {"negative": [""]}, "the prompt is empty"),
        ("a cat", {"n": 0}, "at least 1"),
        ("a cat", {"steps": 0}, "at least 1"),
        ("a cat", {"sampler": "euler"}, "unknown sampler 'euler'"),
    ],
)
def test_bad_requests(studio, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        studio.draw(prompt, **options)


def test_huge_scales_stay_pictures(studio):
    assert torch.isfinite(studio.draw("a cat", n=2, steps=3, scale=1e6).images).all()


def test_a_case_of_the_prompt_is_no_alternative_to_it():
    bank = ["a red rocket", "one rocket.", "a red car", "a rocketry book"]
    assert alternatives("a rocket", bank) == ["one rocket.", "a red car", "a rocketry book"]
    assert alternatives("red", bank) == ["one rocket.", "a rocketry book"]


def test_grid_places_rows_and_columns():
    sheet = grid(torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 1.0, 0.0)]), columns=2, scale=2)
    assert sheet.size == (22, 22)
    assert sheet.getpixel((4, 4)) == (0, 0, 0)
    assert sheet.getpixel((4, 14)) == (128, 128, 128)
