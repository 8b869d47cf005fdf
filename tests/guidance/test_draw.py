import json

import pytest
import torch
from PIL import Image

from clipkit.errors import UsageError
from clipkit.guidance.draw import SAMPLERS, SPACINGS, Start, Steering, Studio, alternatives, picture
from clipkit.guidance.sheet import grid, save_gif, save_grid


@pytest.fixture(scope="module")
def studio(chain):
    return Studio.open(chain, "cpu")


def test_the_same_seed_gives_the_same_bytes(studio, tmp_path):
    for name in ("a", "b"):
        drawn = studio.draw("a red rocket", n=2, steps=3, seed=5)
        save_grid(drawn.images, drawn.about, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_scale_zero_is_unguided_bit_for_bit(studio, monkeypatch):
    at_zero = studio.draw("a red rocket", n=2, steps=3, scale=0, seed=1).images
    monkeypatch.setattr(Studio, "guided", lambda self, denoise, *how: denoise)
    assert torch.equal(studio.draw("a red rocket", n=2, steps=3, seed=1).images, at_zero)


def test_guidance_and_negatives_change_the_picture(studio):
    def images(*arguments, **options):
        return studio.draw(*arguments, n=2, steps=4, **options).images

    plain, guided = images("a cat", scale=0), images("a cat", scale=5)
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, images("a cat", scale=5, negative=["a red cat"]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(studio, sampler):
    drawn = studio.draw("a cat", n=3, steps=3, sampler=sampler)
    assert drawn.images.shape == (3, 3, 24, 24)
    assert drawn.images.abs().max() <= 1
    assert len(drawn.trajectory) == 3
    assert len(drawn.scores) == 3


def test_metadata_and_animation(studio, tmp_path):
    drawn = studio.draw("a cat", n=4, steps=3, seed=9, negative=["a dog"])
    save_grid(drawn.images, drawn.about, tmp_path / "deep" / "grid.png")
    save_gif(drawn.trajectory, tmp_path / "grid.gif")
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
    bank = ["a picture of a red rocket.", "One rocket!", "an orange rocket", "a red car", "a rocketry book"]
    assert alternatives("a photo of a rocket", bank) == ["a red car", "a rocketry book"]
    assert alternatives("a red, red rocket", bank) == bank[1:]
    assert alternatives("red", bank) == ["One rocket!", "an orange rocket", "a rocketry book"]


def test_grid_places_rows_and_columns():
    sheet = grid(torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 1.0, 0.0)]), columns=2, scale=2)
    assert sheet.size == (22, 22)
    assert sheet.getpixel((4, 4)) == (0, 0, 0)
    assert sheet.getpixel((4, 14)) == (128, 128, 128)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_draws(studio, spacing):
    assert studio.draw("a cat", n=1, steps=3, spacing=spacing).about["spacing"] == spacing


def test_a_start_is_kept_as_far_as_strength_says(studio):
    image = picture(Image.new("RGB", (30, 40), (200, 30, 30)), studio.denoiser.image_size)
    assert image.shape == (1, 3, 24, 24)
    weak, strong = (studio.draw("a cat", n=2, steps=10, start=Start(image, s)) for s in (0.1, 0.9))
    assert (len(weak.trajectory), len(strong.trajectory)) == (1, 9)
    distances = [float((drawn.images - image).abs().mean()) for drawn in (weak, strong)]
    assert distances[0] < distances[1]
    with pytest.raises(UsageError, match=r"strength is 1\.5; it must be above 0 and at most 1"):
        Start(image, 1.5)


def test_only_the_masked_part_is_drawn(studio):
    image = picture(Image.new("RGB", (24, 24), (10, 200, 30)), 24)
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 12:] = 1
    drawn = studio.draw("a cat", n=2, steps=4, start=Start(image, 1.0, mask)).images
    assert torch.equal(drawn[..., :12], image[..., :12].expand(2, -1, -1, -1))
    assert not torch.equal(drawn[..., 12:], image[..., 12:].expand(2, -1, -1, -1))


def test_a_reference_draws_its_coarse_shape(studio):
    image = picture(Image.new("RGB", (24, 24), (250, 250, 20)), 24)
    plain, alike = (studio.draw("a cat", n=2, steps=6, scale=0, reference=r).images for r in (None, image))
    blocks = [torch.nn.functional.avg_pool2d(x - image, 3).abs().mean() for x in (plain, alike)]
    assert blocks[1] < blocks[0]


@pytest.mark.parametrize("scale", [1e6, -1e6])
def test_an_absurd_scale_still_makes_finite_pictures(studio, scale):
    assert studio.draw("a cat", n=1, steps=3, scale=scale).images.isfinite().all()


def test_one_prompt_with_a_weight_of_one_is_the_prompt(studio):
    plain = studio.draw("a cat", n=2, steps=3)
    assert torch.equal(studio.draw({"a cat": 1.0}, n=2, steps=3).images, plain.images)
    both = studio.draw({"a cat": 1.0, "something red": 0.5}, n=2, steps=3)
    assert not torch.equal(both.images, plain.images)
    assert both.about["prompt"] == {"a cat": 1.0, "something red": 0.5}
    # The score is the mean of the prompts', by their weights.
    one, other = (studio.score(both.images, {text: 1.0}) for text in ("a cat", "something red"))
    assert both.scores == pytest.approx([(2 * a + b) / 3 for a, b in zip(one, other, strict=True)], abs=1e-3)


@pytest.mark.parametrize(
    "steering",
    [
        Steering(objective="dot"),
        Steering(shift="mean"),
        Steering(interval=(-2.0, 2.0)),
        Steering(picture=torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1),
    ],
    ids=["dot", "mean", "interval", "picture"],
)
def test_every_steering_is_another_picture(studio, steering):
    plain = studio.draw("a cat", n=2, steps=4, negative=["a dog"])
    steered = studio.draw("a cat", n=2, steps=4, negative=["a dog"], steering=steering)
    assert steered.images.isfinite().all()
    assert not torch.equal(steered.images, plain.images)


def test_an_interval_that_no_step_is_in_is_unguided(studio):
    nowhere = studio.draw("a cat", n=2, steps=3, steering=Steering(interval=(50.0, 60.0)))
    unguided = studio.draw("a cat", n=2, steps=3, scale=0)
    torch.testing.assert_close(nowhere.images, unguided.images)


def test_words_that_it_cannot_know_are_named(studio, chain, tmp_path, command):
    assert studio.unknown_words(["The red rocket!", "a photo of a blue fish"]) == []
    words = ["guided-sample", "a giraffe", "--negative", "a red xylophone", "--model", str(chain)]
    _, out, err = command(*words, "--n", "1", "--steps", "1", "--out", str(tmp_path / "x.png"))
    assert err.splitlines()[-1] == (
        "clipkit: no caption that this model learned from had 'giraffe', 'xylophone'; it guessed"
    )
    assert "CLIP scores" in out


def test_the_command_reads_weights(chain, tmp_path, capsys):
    from clipkit.cli import cli

    words = ["guided-sample", "a cat", "a red: thing", "blue:0.5", "--model", str(chain), "--n", "1", "--steps", "2"]
    picture = tmp_path / "look.png"
    Image.new("RGB", (30, 30), "blue").save(picture)
    words += ["--image-prompt", str(picture), "--interval", "-4", "4", "--out", str(tmp_path / "x.png"), "--json"]
    cli.main(words, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == {"a cat": 1.0, "a red: thing": 1.0, "blue": 0.5}
    with pytest.raises(UsageError, match="leave --cfg-scale away"):
        cli.main([*words, "--cfg-scale", "2"], standalone_mode=False)
