import hashlib
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit.commands.drawing import _weight, _white
from clipkit.data import drawings
from clipkit.data.images import decode, to_image
from clipkit.errors import UsageError
from clipkit.guidance.denoiser import Denoiser, DiffusionConfig
from clipkit.guidance.image_grid import check_places, grid, save_gif, save_grid, save_pictures
from clipkit.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
from clipkit.guidance.networks.unet import UNetConfig
from clipkit.guidance.pipeline import GuidanceConfig, Pipeline, Start, picture
from clipkit.guidance.schedule import at_time, log_snr
from clipkit.registry import SAMPLERS, SPACINGS


@pytest.fixture(scope="module")
def pipeline(chain):
    return Pipeline.open(chain, "cpu")


def test_the_same_seed_gives_the_same_bytes(pipeline, tmp_path):
    for name in ("a", "b"):
        drawn = pipeline.draw("a red rocket", n=2, steps=3, seed=5)
        save_grid(drawn.images, drawn.about, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_scale_zero_is_unguided_bit_for_bit(pipeline, monkeypatch):
    at_zero = pipeline.draw("a red rocket", n=2, steps=3, scale=0, seed=1).images
    monkeypatch.setattr(Pipeline, "noise_aware", lambda self, *how: lambda denoise: denoise)
    assert torch.equal(pipeline.draw("a red rocket", n=2, steps=3, seed=1).images, at_zero)


def test_guidance_and_negatives_change_the_picture(pipeline):
    def images(*arguments, **options):
        return pipeline.draw(*arguments, n=2, steps=4, **options).images

    plain, guided = images("a cat", scale=0), images("a cat", scale=5)
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, images("a cat", scale=5, negative=["a red cat"]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(pipeline, sampler):
    drawn = pipeline.draw("a cat", n=3, steps=3, sampler=sampler)
    assert drawn.images.shape == (3, 3, 24, 24)
    assert drawn.images.abs().max() <= 1
    assert len(drawn.trajectory) == 3
    assert len(drawn.scores) == 3


def test_metadata_and_animation(pipeline, tmp_path):
    drawn = pipeline.draw("a cat", n=4, steps=3, seed=9, negative=["a dog"])
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
def test_bad_requests(pipeline, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        pipeline.draw(prompt, **options)


def test_huge_scales_stay_pictures(pipeline):
    assert torch.isfinite(pipeline.draw("a cat", n=2, steps=3, scale=1e6).images).all()


def test_grid_places_rows_and_columns():
    sheet = grid(torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 1.0, 0.0)]), columns=2, scale=2)
    assert sheet.size == (22, 22)
    assert sheet.getpixel((4, 4)) == (0, 0, 0)
    assert sheet.getpixel((4, 14)) == (128, 128, 128)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_draws(pipeline, spacing):
    assert pipeline.draw("a cat", n=1, steps=3, spacing=spacing).about["spacing"] == spacing


def test_a_start_is_kept_as_far_as_strength_says(pipeline):
    image = picture(Image.new("RGB", (30, 40), (200, 30, 30)), pipeline.denoiser.image_size)
    assert image.shape == (1, 3, 24, 24)
    weak, strong = (pipeline.draw("a cat", n=2, steps=10, start=Start(image, s)) for s in (0.1, 0.9))
    assert (len(weak.trajectory), len(strong.trajectory)) == (1, 9)
    assert (strong.about["steps"], strong.about["steps_taken"], strong.about["strength"]) == (10, 9, 0.9)
    distances = [float((drawn.images - image).abs().mean()) for drawn in (weak, strong)]
    assert distances[0] < distances[1]
    with pytest.raises(UsageError, match=r"strength is 1\.5; it must be above 0 and at most 1"):
        Start(image, 1.5)


def test_only_the_masked_part_is_drawn(pipeline):
    image = picture(Image.new("RGB", (24, 24), (10, 200, 30)), 24)
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 12:] = 1
    drawn = pipeline.draw("a cat", n=2, steps=4, start=Start(image, 1.0, mask)).images
    assert torch.equal(drawn[..., :12], image[..., :12].expand(2, -1, -1, -1))
    assert not torch.equal(drawn[..., 12:], image[..., 12:].expand(2, -1, -1, -1))


def test_a_reference_draws_its_coarse_shape(pipeline):
    image = picture(Image.new("RGB", (24, 24), (250, 250, 20)), 24)
    plain, alike = (pipeline.draw("a cat", n=2, steps=6, scale=0, reference=r).images for r in (None, image))
    blocks = [torch.nn.functional.avg_pool2d(x - image, 3).abs().mean() for x in (plain, alike)]
    assert blocks[1] < blocks[0]


@pytest.mark.parametrize("scale", [1e6, -1e6])
def test_an_absurd_scale_still_makes_finite_pictures(pipeline, scale):
    assert pipeline.draw("a cat", n=1, steps=3, scale=scale).images.isfinite().all()


def test_one_prompt_with_a_weight_of_one_is_the_prompt(pipeline):
    plain = pipeline.draw("a cat", n=2, steps=3)
    assert torch.equal(pipeline.draw({"a cat": 1.0}, n=2, steps=3).images, plain.images)
    both = pipeline.draw({"a cat": 1.0, "something red": 0.5}, n=2, steps=3)
    assert not torch.equal(both.images, plain.images)
    assert both.about["prompt"] == {"a cat": 1.0, "something red": 0.5}
    # The score is the mean of the prompts', by their weights.
    one, other = (pipeline.score(both.images, {text: 1.0}) for text in ("a cat", "something red"))
    assert both.scores == pytest.approx([(2 * a + b) / 3 for a, b in zip(one, other, strict=True)], abs=1e-3)


@pytest.mark.parametrize(
    "guidance",
    [
        GuidanceConfig(objective="dot"),
        GuidanceConfig(shift="mean"),
        GuidanceConfig(interval=(-2.0, 2.0)),
        GuidanceConfig(picture=torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1),
    ],
    ids=["dot", "mean", "interval", "picture"],
)
def test_every_setting_is_another_picture(pipeline, guidance):
    plain = pipeline.draw("a cat", n=2, steps=4, negative=["a dog"])
    steered = pipeline.draw("a cat", n=2, steps=4, negative=["a dog"], guidance=guidance)
    assert steered.images.isfinite().all()
    assert not torch.equal(steered.images, plain.images)


def test_words_that_it_cannot_know_are_named(pipeline, chain, tmp_path, command):
    assert pipeline.unknown_words(["The red rocket!", "a photo of a blue fish"]) == []
    words = ["guided-sample", "a giraffe", "--negative", "a red xylophone", "--model", str(chain)]
    _, out, err = command(*words, "--n", "1", "--steps", "1", "--out", str(tmp_path / "x.png"))
    said = "clipkit: no caption that this model learned from had 'giraffe', 'xylophone'; it guesses those words"
    assert err.splitlines()[-1] == said
    assert "CLIP scores" in out
    # Before it draws, and in any script.
    code, _, err = command(*words, "--steps", "1001", "--sampler", "ddim", "--out", str(tmp_path / "y.png"))
    assert (code, err.splitlines()[0]) == (2, said)
    assert pipeline.unknown_words(["\U0001f680 \u732b"]) == ["\U0001f680", "\u732b"]


def test_the_command_reads_weights(chain, tmp_path, capsys):
    from clipkit.cli import cli

    words = ["guided-sample", "a cat", "a red: thing", "blue:0.5", "--model", str(chain), "--n", "1", "--steps", "5"]
    picture = tmp_path / "look.png"
    Image.new("RGB", (30, 30), "blue").save(picture)
    words += ["--image-prompt", str(picture), "--interval", "-4", "4", "--out", str(tmp_path / "x.png"), "--json"]
    cli.main(words, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == {"a cat": 1.0, "a red: thing": 1.0, "blue": 0.5}
    with pytest.raises(UsageError, match="omit the classifier-free scale"):
        cli.main([*words, "--cfg-scale", "2"], standalone_mode=False)


@pytest.fixture(scope="module")
def tiny():
    return Pipeline.open("clipkit-tiny", "cpu")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_picture_is_the_same_whatever_n_is(pipeline, sampler):
    one, many = (pipeline.draw("a cat", n=n, steps=4, sampler=sampler, scale=0).images for n in (1, 4))
    torch.testing.assert_close(one[0], many[0], atol=1e-3, rtol=0)
    assert (many[1] - many[0]).abs().max() > 0.1
    other = pipeline.draw("a cat", n=1, steps=4, sampler=sampler, scale=0, seed=1).images
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_levels_are_taken_once_and_counted(pipeline, monkeypatch, sampler, spacing):
    """A schedule's levels beyond the denoiser's range are clamped, and many steps meet several of them."""
    monkeypatch.setattr(pipeline.denoiser, "lambda_range", lambda: (-2.0, 2.0))
    drawn = pipeline.draw("a cat", n=1, steps=30, scale=0, sampler=sampler, spacing=spacing)
    assert drawn.about["steps"] == 30
    assert 5 < drawn.about["steps_taken"] == len(drawn.trajectory) < 30
    assert drawn.images.isfinite().all()
    assert drawn.images.std() > 0.01


def test_strength_is_a_share_of_the_schedules_time(pipeline):
    low, high = pipeline.denoiser.lambda_range()
    table = log_snr("cosine").clamp(low, high)
    for spacing in SPACINGS:
        for strength in (0.003, 0.2, 0.5, 0.8):
            levels = pipeline._lambdas(20, spacing, strength)
            level = float(at_time(table, torch.tensor([strength]).double()))
            assert len(levels) <= math.ceil(20 * strength)
            assert bool((levels.diff() > 0).all())
            assert float(levels[-1]) <= high + 1e-9
            if spacing != "leading":  # which begins within a step of it
                assert float(levels[0]) == pytest.approx(level, abs=1e-5)
            assert float(levels[0]) >= level - 1e-9


def test_stronger_starts_are_visibly_further_from_the_picture(tiny):
    house = picture(drawings.draw("train", 3, 7, size=24).image, 24)
    drawn = [tiny.draw("a house", n=2, steps=12, start=Start(house, s)).images for s in (0.2, 0.5, 0.8)]
    drawn.append(tiny.draw("a house", n=2, steps=12).images)
    distances = [float((images - house).abs().mean()) for images in drawn]
    assert distances[0] > 0.05
    assert all(b > 1.15 * a for a, b in pairwise(distances)), distances
    default = tiny.draw("a house", n=2, steps=12, start=Start(house)).images
    assert distances[1] < float((default - house).abs().mean()) < distances[2]


def test_a_negative_prompt_is_never_drawn(tiny):
    """Below scale 1 the classifier-free mixture would be of it; a noise-aware CLIP may push away from it there too."""
    for cfg_scale in (0.0, 0.5, 1.0):
        with pytest.raises(UsageError, match=rf"no effect at the classifier-free scale {cfg_scale:g} and"):
            tiny.draw("a cat", n=1, steps=2, negative=["a car"], guidance=GuidanceConfig(cfg_scale))
        x, lam = torch.randn(1, 3, 24, 24), torch.tensor(0.3)
        found = tiny.conditional({"a cat": 1.0}, ["a car"], cfg_scale)(x, lam).x0
        assert torch.equal(found, tiny.conditional({"a cat": 1.0}, [], cfg_scale)(x, lam).x0)
    with pytest.raises(UsageError, match=r"the classifier-free scale is -1\.0; it must be a finite number, 0 or more"):
        GuidanceConfig(-1.0)
    guidance = GuidanceConfig(0.0)
    plain, away = (
        tiny.draw("a cat", n=1, steps=3, scale=5, negative=n, guidance=guidance).images for n in ([], ["a car"])
    )
    assert not torch.equal(plain, away)
    with pytest.raises(UsageError, match="would be drawn at the noise-aware scale -5"):
        tiny.draw("a cat", n=1, steps=2, scale=-5, negative=["a car"])


def test_a_negative_prompt_needs_guidance_where_there_is_no_description(pipeline):
    with pytest.raises(UsageError, match="no effect at the noise-aware scale 0; give a scale above 0"):
        pipeline.draw("a cat", n=1, steps=2, scale=0, negative=["a dog"])


def test_several_prompts_need_guidance(pipeline, tiny):
    both = {"a cat": 1.0, "red": 0.5}
    with pytest.raises(UsageError, match=r"^2 prompts have no effect at the noise-aware scale 0; give a scale above 0"):
        pipeline.draw(both, n=1, steps=2, scale=0)
    with pytest.raises(
        UsageError, match=r"^2 prompts have no effect at the classifier-free and the noise-aware scale 0"
    ):
        tiny.draw(both, n=1, steps=2, scale=0, guidance=GuidanceConfig(0.0))
    one, other = (tiny.draw(p, n=1, steps=2, guidance=GuidanceConfig(0.0)).images for p in ("a cat", "a car"))
    assert torch.equal(one, other)  # without guidance; they are scored by their prompts all the same
    told, guided = (
        tiny.draw(both, n=1, steps=2, scale=s, guidance=GuidanceConfig(c)).images for s, c in ((0, 0.5), (5, 0.0))
    )
    assert not torch.equal(told, one)
    assert not torch.equal(guided, one)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a cat", {"scale": math.nan}, "the noise-aware scale is nan"),
        ("a cat", {"scale": -math.inf}, "the noise-aware scale is -inf"),
        ({"a cat": math.nan}, {}, "the weight of 'a cat' is nan"),
        ({"a cat": 1.0, "red": math.inf}, {}, "the weight of 'red' is inf"),
        ({"a cat": 1.0, "red": 0.0}, {}, "the weight of 'red' is 0"),
        ({"a cat": 2.0}, {}, "weights are relative among several prompts"),
        ({"a cat": -1.0}, {}, "negative prompts are what to avoid"),
        ({}, {}, "the prompt is empty"),
        ("a cat", {"seed": -1}, "seed is -1; it must be from 0 to 4294967295"),
        ("a cat", {"seed": 2**32}, "seed is 4294967296"),
        ("a cat", {"seed": 2**70}, "it must be from 0"),
        ("a cat", {"reference": torch.zeros(1, 3, 8, 8)}, r"a picture is \[1, 3, 8, 8\]; it must be \[N, 3, S, S\]"),
        ("a cat", {"start": Start(torch.zeros(3, 3, 24, 24))}, "3 initial pictures for 2 to draw"),
        (
            "a cat",
            {"start": Start(torch.zeros(1, 3, 24, 24), 0.2), "reference": torch.zeros(1, 3, 24, 24)},
            "a reference has no effect at this strength, which",
        ),
    ],
)
def test_what_cannot_be_drawn_or_has_no_effect(pipeline, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        pipeline.draw(prompt, **{"n": 2, "steps": 2, **options})


@pytest.mark.parametrize(
    ("guidance", "names"),
    [
        ({"objective": "dot"}, "the objective has"),
        ({"objective": "softmax", "shift": "score"}, "the objective and the shift have"),
        ({"interval": (-2.0, 2.0)}, "the interval has"),
        ({"picture": torch.zeros(1, 3, 24, 24)}, "the image prompt has"),
    ],
)
def test_what_says_how_to_guide_is_refused_without_guidance(pipeline, guidance, names):
    with pytest.raises(UsageError, match=f"^{names} no effect at the noise-aware scale 0"):
        pipeline.draw("a cat", n=1, steps=2, scale=0, guidance=GuidanceConfig(**guidance))


@pytest.mark.parametrize("interval", [(50.0, 60.0), (5.0, -5.0), (math.nan, 0.0), (-1.0, 1.0)])
def test_an_interval_in_which_no_step_lies_is_refused(pipeline, interval):
    with pytest.raises(UsageError, match=r"is empty|no step lies in the interval"):
        pipeline.draw("a cat", n=1, steps=2, guidance=GuidanceConfig(interval=interval))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_settings_that_are_not_finite(value):
    with pytest.raises(UsageError, match="the classifier-free scale is"):
        GuidanceConfig(value)
    with pytest.raises(UsageError, match="strength is"):
        Start(torch.zeros(1, 3, 4, 4), value)


@pytest.mark.parametrize(
    ("strength", "white", "message"),
    [(1.0, None, "nothing is left"), (0.5, 1.0, "white all over"), (1.0, 0.0, "black all over")],
)
def test_a_start_that_keeps_nothing_or_all(strength, white, message):
    mask = None if white is None else torch.full((1, 1, 4, 4), white)
    with pytest.raises(UsageError, match=message):
        Start(torch.zeros(1, 3, 4, 4), strength, mask)


def test_pictures_that_are_not_finite_are_an_error(pipeline, monkeypatch):
    monkeypatch.setattr(Pipeline, "_shown", lambda self, x0: x0 * math.nan)
    with pytest.raises(UsageError, match="came out as NaN"):
        pipeline.draw("a cat", n=1, steps=2, scale=0)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_what_a_mask_keeps_is_kept_in_latents_too(pipeline, strength):
    """Where the autoencoder is not exact: this one is untrained."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(image_size=32, channels=32, multipliers=(1, 2))).eval()
    network = UNetConfig(image_size=16, channels=16, multipliers=(1, 2), blocks=1, patch_size=1)
    denoiser = Denoiser(network, DiffusionConfig(), None, 4).eval().requires_grad_(False)
    latent = Pipeline(denoiser, None, pipeline.clip, autoencoder.requires_grad_(False))
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32)
    mask[..., 5:9, 3:20] = 1  # not in whole latents
    watched = []
    start = Start(image, strength, mask)
    drawn = latent.draw("a cat", n=2, steps=3, scale=0, start=start, watch=watched.append)
    for pictures in (drawn.images, *drawn.trajectory, *watched):
        assert torch.equal(pictures[:, :, mask[0, 0] == 0], image[:, :, mask[0, 0] == 0].expand(2, -1, -1))
    assert not torch.equal(drawn.images[0, :, mask[0, 0] == 1], image[0, :, mask[0, 0] == 1])
    assert torch.equal(drawn.trajectory[-1], drawn.images)


def test_what_is_not_read_of_a_prompt_is_named(pipeline, tiny):
    assert tiny.cut_after(["a red rocket", "red " * 29 + "fish cat"]) == {"red " * 29 + "fish cat": "fish"}
    assert tiny.cut_after(["red " * 29 + "fish"]) == {}
    # A noise-aware CLIP may read less than the denoiser.
    assert tiny.cut_after(["red " * 21 + "fish cat"], scale=1.0) == {"red " * 21 + "fish cat": "fish"}
    assert pipeline.draw("a cat " * 20, n=1, steps=1).about["cut_after"] == {"a cat " * 20: "cat"}


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat:0.5", ("a cat", 0.5)),
        ("a cat: 0.5", ("a cat", 0.5)),
        ("a cat:-1", ("a cat", -1.0)),
        ("a cat:1e-1", ("a cat", 0.1)),
        ("a cat", ("a cat", None)),
        ("a red: thing", ("a red: thing", None)),
        ("a cat:", ("a cat:", None)),
        ("a clock at 10:30", ("a clock at 10:30", None)),
        ("a ratio of 16:9", ("a ratio of 16:9", None)),
        ("chapter 3:2", ("chapter 3:2", None)),
        ("12:30:45", ("12:30:45", None)),
        ("a clock at 10:30 :0.5", ("a clock at 10:30", 0.5)),
        ("route 66:0.5", ("route 66", 0.5)),
        ("area 51:-1", ("area 51", -1.0)),
        ("area 51: -1", ("area 51", -1.0)),
        ("level 2:inf", ("level 2:inf", None)),
        ("room 1:1e3", ("room 1:1e3", None)),
        ("a  cat ", ("a cat", None)),
        ("psalm:23 :1", ("psalm:23", 1.0)),
        ("http://x:y", ("http://x:y", None)),
    ],
)
def test_a_weight_is_a_number_after_a_colon_but_not_a_time_or_a_ratio(prompt, found):
    assert _weight(prompt) == found


@given(st.text().map(lambda text: " ".join(text.split())).filter(bool), st.floats(allow_nan=False))
def test_any_text_can_be_weighted(text, weight):
    assert _weight(f"{text} :{weight!r}") == (text, weight)


def test_the_metadata_of_a_picture_draws_it_again(pipeline, chain, command, tmp_path):
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "blue.png")
    half = Image.new("RGB", (24, 24), "black")
    half.paste("white", (12, 0, 24, 24))
    half.save(tmp_path / "half.png")
    words = ["guided-sample", "a cat", "something red:0.5", "--model", chain, "--n", 3, "--steps", 5, "--seed", 7]
    words += ["--negative", "a dog", "--objective", "dot", "--interval", -5, "inf", "--sampler", "ddpm"]
    words += ["--init", tmp_path / "blue.png", "--mask", tmp_path / "half.png", "--strength", 0.9]
    words += ["--image-prompt", tmp_path / "blue.png", "--out", f"{tmp_path}/drawn/", "--json"]
    code, out, _ = command(*words)
    assert code == 0
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    with Image.open(tmp_path / "drawn" / "0002.png") as single:
        about = {
            key: value if key in ("sampler", "model") else json.loads(value, parse_constant=pytest.fail)
            for key, value in single.text.items()
            if key not in ("spacing", "clipkit", "objective", "shift")
        }
        pixels = single.convert("RGB").tobytes()
    assert json.loads(out)["clip_scores"][2] == about["clip_score"]
    digest = hashlib.sha256((tmp_path / "blue.png").read_bytes()).hexdigest()
    assert about["init"] == about["image_prompt"] == {"file": "blue.png", "sha256": digest}
    assert about["weights"] == pipeline.fingerprints
    assert about["weights"].keys() == {"denoiser", "noisy_clip", "clip"}
    assert (about["interval"], about["index"], about["model"]) == ([-5.0, None], 2, str(chain))
    blue, white = (picture(Image.open(tmp_path / name).convert("RGB"), 24) for name in ("blue.png", "half.png"))
    again = pipeline.draw(
        about["prompt"],
        n=about["index"] + 1,
        steps=about["steps"],
        scale=about["scale"],
        sampler=about["sampler"],
        negative=about["negative"],
        seed=about["seed"],
        start=Start(blue, about["strength"], _white(white)),
        guidance=GuidanceConfig(objective="dot", interval=(-5.0, math.inf), picture=blue),
    )
    assert to_image(again.images[2]).tobytes() == pixels


def test_the_format_is_what_the_suffix_says_and_the_metadata_is_there(pipeline, tmp_path):
    drawn = pipeline.draw("a cat \U0001f680", n=1, steps=2, scale=0)
    for name, kind in (("a.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("c.webp", "WEBP"), ("d.PNG", "PNG")):
        save_grid(drawn.images, drawn.about, tmp_path / name)
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == kind
            about = sheet.text if kind == "PNG" else json.loads(sheet.getexif()[0x010E])
        assert about["prompt"] == "a cat \U0001f680"
        assert decode((tmp_path / name).read_bytes()).size == (100, 100)
    with pytest.raises(UsageError, match="cannot write"):
        save_grid(drawn.images, {"prompt": "cat " * 20_000}, tmp_path / "e.jpg")
    save_grid(drawn.images, {"prompt": "not UTF-8: \udcff"}, tmp_path / "f.png")


def test_places_are_checked_before_the_drawing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.gif").mkdir()
    save_pictures(torch.zeros(3, 3, 4, 4), [{}] * 3, tmp_path / "drawn")
    (tmp_path / "drawn" / "notes.png").write_bytes(b"")
    check_places(f"{tmp_path}/drawn", None, 3)
    check_places(f"{tmp_path}/new/deep/", tmp_path / "new" / "b.gif", 1)
    assert not (tmp_path / "new").exists()
    for out, gif, message in (
        ("a.mp4", None, "does not say what to write"),
        ("grid", None, "does not say what to write"),
        ("a.png", "b.mp4", "must end in one of .gif"),
        ("a.png", "a.gif", "is a folder"),
        ("file/a.png", None, "cannot write into"),
        ("file/", None, "cannot write into"),
        ("a.png", "file/b.gif", "cannot write into"),
        ("drawn", None, "holds 0002.png, which 2 pictures would not replace"),
    ):
        with pytest.raises(UsageError, match=message):
            check_places(f"{tmp_path}/{out}", gif and tmp_path / gif, 2)


def test_both_scales_are_printed_with_their_names(command, tmp_path):
    words = ["guided-sample", "a cat", "--n", 1, "--steps", 1, "--cfg-scale", 3, "--out", tmp_path / "a.png"]
    assert "1 x 'a cat', classifier-free scale 3, noise-aware scale 0, seed 0" in command(*words)[1]
