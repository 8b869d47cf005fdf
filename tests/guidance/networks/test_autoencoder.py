"""Against diffusers, closed forms and by what they are for."""

import json
import math

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from toy_distributions import LATENT, TINY

from clipkit.cli import cli
from clipkit.errors import CheckpointError, RecipeError
from clipkit.guidance.loading import load_autoencoder, load_denoiser, load_guide
from clipkit.guidance.networks.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Codebook,
    Discriminator,
    from_diffusers,
    frozen_scores,
)
from clipkit.guidance.pipeline import GuidanceConfig, Pipeline, Start

SMALL = AutoencoderConfig(16, 8, (1, 2), 1, 3, groups=4)


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 4), (1, 2, 2, 4)])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_shapes(multipliers, kind):
    config = AutoencoderConfig(32, 8, multipliers, 1, 3, kind, codes=20, groups=4)
    assert config.factor == 2 ** (len(multipliers) - 1)
    model = Autoencoder(config).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    z = model.encode(images)
    assert z.shape == (2, 3, config.latent_size, config.latent_size)
    assert model.decode(z).shape == images.shape
    assert model.embed(images).loss.shape == (2,)


def test_a_folder_of_diffusers_gives_equal_outputs(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 32), layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4, norm_num_groups=4, sample_size=32, scaling_factor=0.3,
    ).eval()  # fmt: skip
    for name, p in theirs.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mean
        torch.testing.assert_close(ours.encode(images), mean * 0.3, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean * 0.3), theirs.decode(mean).sample, rtol=1e-5, atol=1e-5)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    former = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = {}
    for name, tensor in tensors.items():
        for now, then in former.items():
            name = name.replace(now, then)
        products = "attentions" in name and tensor.ndim == 2
        old[name] = tensor[..., None, None].contiguous() if products else tensor
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(old, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    with torch.no_grad():
        assert torch.equal(from_diffusers(tmp_path / "old").encode(images), ours.encode(images))
    about = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        ({"shift_factor": 0.1}, "shift_factor = 0.1 asks for an architecture"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu' asks for an architecture"),
        ({"use_quant_conv": False}, "use_quant_conv = False asks for an architecture"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv = False asks for"),
        ({"latents_mean": [0.0] * 4}, "latents_mean = .* asks for an architecture"),
        ({"latents_std": [1.0] * 4}, "latents_std = .* asks for an architecture"),
        ({"in_channels": 4}, "in_channels = 4 asks for an architecture"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention = False asks for"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types is .* DownEncoderBlock2D only"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is .* one for each width"),
        ({"block_out_channels": [8, 20, 32]}, "all must be multiples of the first"),
        ({"sample_size": [32, 64]}, r"sample_size is \[32, 64\]; clipkit has square images only"),
        ({"double_z": False}, "double_z = False is unknown to clipkit, and may change what the model computes"),
        ({"scaling_factor": None}, "scaling_factor = None must be of the type of 0.18215"),
        ({"scaling_factor": "0.3"}, "scaling_factor = '0.3' must be of the type of"),
        ({"scaling_factor": float("nan")}, "scaling_factor = nan must be of the type of"),
        ({"scaling_factor": float("inf")}, "scaling_factor = inf must be of the type of"),
        ({"scaling_factor": True}, "scaling_factor = True must be of the type of"),
        ({"scaling_factor": 0}, "scaling_factor is 0.0; it must be above 0"),
        ({"scaling_factor": -1}, "scaling_factor is -1.0; it must be above 0"),
        ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "describes no autoencoder"),
        ({"norm_num_groups": 5}, "must be a multiple of groups"),
    ):
        (tmp_path / "old" / "config.json").write_text(json.dumps({**about, **wrong}))
        with pytest.raises(CheckpointError, match=message):
            from_diffusers(tmp_path / "old")
    save_file(
        {n: t for n, t in tensors.items() if "conv_in" not in n}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds another architecture"):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(CheckpointError, match="holds a VQModel"):
        from_diffusers(tmp_path)


def test_a_folder_of_diffusers_that_leaves_things_out_means_their_defaults(tmp_path):
    """scaling_factor came with diffusers 0.12: without it latents are multiplied by 0.18215, as by Stable Diffusion."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(block_out_channels=(32,)).eval()
    theirs.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    kept = {key: about[key] for key in ("_class_name", "block_out_channels")}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    ours, again = load_autoencoder(tmp_path), diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert (again.config.scaling_factor, again.config.sample_size) == (0.18215, ours.config.image_size)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        wanted = theirs.encode(images).latent_dist.mean * 0.18215
        torch.testing.assert_close(ours.encode(images), wanted, rtol=1e-5, atol=1e-6)


def test_every_argument_of_diffusers_has_been_decided():
    import inspect

    from clipkit.guidance.networks import autoencoder

    diffusers = pytest.importorskip("diffusers")
    theirs = set(inspect.signature(diffusers.AutoencoderKL.__init__).parameters) - {"self"}
    assert theirs <= {*autoencoder._USED, *autoencoder._BUILT_IN, *autoencoder._FREE}


def test_a_denoiser_of_their_latents_draws(chain, packs, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from clipkit.train import denoiser

    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=24,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "autoencoder")
    words = [*TINY, f"data.shards={packs / 'train'}", f"latent.autoencoder={tmp_path / 'autoencoder'}"]
    words += ["unet.image_size=12", "unet.patch_size=1", "unet.multipliers=[1,2]", "condition.kind=class"]
    denoiser.run("drawings_denoiser", [*words, f"run.out={tmp_path / 'denoiser'}"])
    (tmp_path / "clip").symlink_to(chain / "clip")
    assert Pipeline.open(tmp_path, "cpu").draw("red car", n=1, steps=2).images.shape == (1, 3, 24, 24)


def test_the_kl_term_is_that_of_normal_distributions():
    model = Autoencoder(SMALL)
    images = torch.rand(3, 3, 16, 16)
    found = model.embed(images).loss
    mean, log_variance = model.before(model.encoder(images)).chunk(2, dim=1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(found, exact.flatten(1).mean(dim=1))


def test_a_codebook_finds_the_nearest_and_gradients_go_straight_through():
    book = Codebook(5, 2)
    z = torch.randn(2, 2, 3, 3)
    near, numbers = book.nearest(z)
    for i in range(2):
        for y in range(3):
            for x in range(3):
                distances = (book.vectors - z[i, :, y, x]).square().sum(dim=1)
                assert numbers[i, y, x] == distances.argmin()
                assert torch.equal(near[i, :, y, x], book.vectors[numbers[i, y, x]])
    model = Autoencoder(AutoencoderConfig(16, 8, (1, 2), 1, 3, "vq", codes=7, groups=4))
    model.embed(torch.rand(1, 3, 16, 16)).z.sum().backward()
    assert model.encoder.stem.weight.grad.abs().sum() > 0


def test_codes_follow_the_mean_of_what_they_stand_for():
    torch.manual_seed(0)
    book, centres = Codebook(2, 1, decay=0.9), torch.tensor([-3.0, 5.0])
    book.vectors.copy_(torch.tensor([[-1.0], [1.0]]))
    book.sums.copy_(book.vectors)
    for _ in range(200):
        z = (centres[torch.randint(2, (64,))] + 0.1 * torch.randn(64)).view(64, 1, 1, 1)
        book.gather(z, book.nearest(z)[1])
        assert float(book.follow()) == 1.0
    torch.testing.assert_close(book.vectors.flatten(), centres, atol=0.05, rtol=0)


def test_codes_that_nothing_uses_start_again():
    torch.manual_seed(0)
    book = Codebook(2, 1, decay=0.5)
    book.vectors.copy_(torch.tensor([[0.0], [1000.0]]))
    for _ in range(12):
        z = torch.randn(32, 1, 1, 1)
        book.gather(z, book.nearest(z)[1])
        book.follow()
    assert book.vectors.abs().max() < 10


def test_the_players_gradients_stay_apart():
    discriminator = Discriminator(8, 2)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    scores = frozen_scores(discriminator, images)
    torch.testing.assert_close(scores, discriminator(images).flatten(1).mean(dim=1))
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())


def test_the_spread_of_latents_is_measured(chain, packs):
    from clipkit.config import load_recipe
    from clipkit.data.loader import Batch
    from clipkit.data.shards import Shards
    from clipkit.train.autoencoder import AutoencoderRecipe, Reconstruction

    recipe = load_recipe(AutoencoderRecipe, "emoji_autoencoder", [*LATENT, "reconstruction.perceptual=0"])
    torch.manual_seed(0)
    task = Reconstruction(recipe, Shards(packs / "train"))
    images = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8)
    nn.init.normal_(task.model.autoencoder.before.weight, std=0.5)
    for _ in range(30):
        task(Batch(images, [""] * 16, torch.zeros(16, dtype=torch.int64), [""] * 16))
        task.after_step()
    assert int(task.model.steps) == 30
    drawn = task.model.autoencoder.embed(images.float() / 127.5 - 1).z.detach()
    assert float(task.model.autoencoder.spread) == pytest.approx(float(drawn.std()), rel=0.05)
    mean = task.model.autoencoder.encode(images.float() / 127.5 - 1)
    assert float(mean.std()) < 1.1


def test_the_log_tells_both_players(latent):
    lines = [json.loads(line) for line in (latent / "autoencoder" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["discriminator"] == 0
    assert 0.2 < steps[-1]["discriminator"] < 3  # from step 2 on; the hinge of one who knows nothing is 1
    assert any("psnr" in line and math.isfinite(line["psnr"]) for line in lines)


def test_guided_sampling_of_latents(latent, capsys):
    pipeline = Pipeline.open(latent, "cpu")
    assert (pipeline.image_size, pipeline.denoiser.image_size, pipeline.denoiser.channels) == (24, 12, 4)
    drawn = pipeline.draw("a red rocket", n=2, steps=3)
    assert drawn.images.shape == (2, 3, 24, 24)
    assert drawn.images.abs().max() <= 1
    assert [x.shape for x in drawn.trajectory] == [(2, 3, 24, 24)] * 3
    assert not torch.equal(drawn.images, pipeline.draw("a red rocket", n=2, steps=3, scale=0).images)
    picture = torch.rand(1, 3, 24, 24) * 2 - 1
    mask = torch.zeros(1, 1, 24, 24)
    mask[..., 12:] = 1
    start = Start(picture, 0.5, mask)
    again = pipeline.draw(
        "a cat", n=2, steps=4, start=start, reference=picture, guidance=GuidanceConfig(picture=picture)
    )
    assert again.images.isfinite().all()


def test_every_part_learns(latent):
    """The noise-aware tower is one for latents; the text tower is the clean CLIP's."""
    guide = load_guide(latent)
    assert guide.model.clip.config.image_kwargs["in_chans"] == 4
    features, _ = guide.model.encode_image(torch.randn(2, 4, 12, 12), torch.zeros(2))
    assert features.shape == guide.embed(["a", "b"]).shape
    assert load_denoiser(latent).latent_channels == 4


def test_a_codebook_trains_and_draws(latent, chain, packs, tmp_path):
    from clipkit.train import autoencoder

    data = [*TINY, f"data.shards={packs / 'train'}", "reconstruction.perceptual=0", "data.val="]
    data += ["reconstruction.adversarial=0"]
    autoencoder.run(
        "emoji_autoencoder",
        [*data, *LATENT, "autoencoder.kind=vq", "autoencoder.codes=16", f"run.out={tmp_path / 'autoencoder'}"],
    )
    lines = [json.loads(line) for line in (tmp_path / "autoencoder" / "log.jsonl").read_text().splitlines()]
    assert 0 < [line for line in lines if "codebook_used" in line][-1]["codebook_used"] <= 1
    model = load_autoencoder(tmp_path)
    z = model.encode(torch.rand(1, 3, 24, 24))
    assert torch.equal(model.decode(z), model.decode(z + 1e-6))  # quantised again


def test_what_does_not_go_together(latent, chain, packs, tmp_path, capsys):
    from clipkit.train import denoiser

    words = [*TINY, f"data.shards={packs / 'train'}", f"latent.autoencoder={latent / 'autoencoder'}"]
    with pytest.raises(RecipeError, match="have a side of 12"):
        denoiser.run("drawings_denoiser", [*words, f"run.out={tmp_path / 'x'}"])
    with pytest.raises(RecipeError, match="does not divide by 4; choose a multiple"):
        AutoencoderConfig(image_size=30)
    with pytest.raises(RecipeError, match="must be a multiple of groups"):
        AutoencoderConfig(channels=20)
    with pytest.raises(SystemExit):
        cli.main(["noise-curve", "--model", str(latent), "--shards", str(packs / "heldout"), "--n", "x"])


def two_steps(words):
    """On each rank: the weights after two steps, before and after the discriminator comes in."""
    from clipkit.config import load_recipe
    from clipkit.train.autoencoder import AutoencoderRecipe, Reconstruction
    from clipkit.train.launch import train_recipe

    recipe = load_recipe(AutoencoderRecipe, "emoji_autoencoder", words)
    folder = train_recipe(recipe, Reconstruction, torch.device("cpu"))
    return load_file(folder / "checkpoints" / "step-00000003" / "model.safetensors")


def test_two_ranks_train_both_players(packs, tmp_path):
    words = [
        *TINY,
        *LATENT,
        f"data.shards={packs / 'train'}",
        "data.val=",
        "run.steps=3",
        "reconstruction.perceptual=0",
    ]
    words += ["reconstruction.adversarial_from=1", f"run.out={tmp_path / 'run'}"]
    one, other = on_ranks(2, two_steps, words)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert int(one["steps"]) == 3


def test_the_discriminator_rests_until_it_comes_in(packs, tmp_path):
    from clipkit.train import autoencoder

    words = [*TINY, *LATENT, f"data.shards={packs / 'train'}", "data.val=", "reconstruction.perceptual=0"]
    words += [
        "reconstruction.adversarial_from=3",
        "run.save_every=1",
        "run.keep_every=1",
        f"run.out={tmp_path / 'run'}",
    ]
    autoencoder.run("emoji_autoencoder", words)
    first, resting, last = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{n}" / "model.safetensors") for n in (1, 3, 4)
    )
    names = [name for name in first if name.startswith("discriminator")]
    assert all(torch.equal(first[name], resting[name]) for name in names)
    assert not all(torch.equal(first[name], last[name]) for name in names)


@pytest.mark.parametrize("size", [6, 7, 10, 12, 16, 22, 23, 24, 31, 64])
def test_the_discriminator_sees_small_pictures(size):
    """With the same weights at every size, so that runs from before resume."""
    discriminator = Discriminator(8, image_size=size)
    scores = discriminator(torch.rand(2, 3, size, size))
    assert min(scores.shape[2:]) >= 1
    assert scores.isfinite().all()
    shapes = {name: tensor.shape for name, tensor in Discriminator(8).state_dict().items()}
    assert {name: tensor.shape for name, tensor in discriminator.state_dict().items()} == shapes


@pytest.mark.parametrize("size", [24, 25, 64, 256])
def test_the_discriminator_of_larger_pictures_is_what_it_was(size):
    torch.manual_seed(0)
    one = Discriminator(8)
    other = Discriminator(8, image_size=size)
    assert [m.stride for m in one.modules() if isinstance(m, nn.Conv2d)] == [
        m.stride for m in other.modules() if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize("size", [6, 10, 18])
def test_small_pictures_train_beyond_the_step_of_the_discriminator(size, packs, tmp_path):
    from clipkit.train import autoencoder

    words = [*TINY, *LATENT, f"data.shards={packs / 'train'}", "data.val=", "reconstruction.perceptual=0"]
    words += [f"autoencoder.image_size={size}", "reconstruction.adversarial_from=1", f"run.out={tmp_path / 'run'}"]
    autoencoder.run("emoji_autoencoder", [*words, "run.steps=2", "run.batch_size=4", "run.log_every=1"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["discriminator"] > 0 for line in lines if "discriminator" in line] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["autoencoder.image_size=0"], "autoencoder.image_size is 0"),
        (["autoencoder.image_size=66"], "does not divide by 4"),
        (["autoencoder.channels=-16"], "autoencoder.channels is -16"),
        (["autoencoder.groups=0"], "autoencoder.groups is 0"),
        (["autoencoder.blocks=0"], "autoencoder.blocks is 0"),
        (["autoencoder.latent_channels=0"], "autoencoder.latent_channels is 0"),
        (["autoencoder.kind=vq", "autoencoder.codes=0"], "autoencoder.codes is 0"),
        (["autoencoder.multipliers=[]"], "autoencoder.multipliers are"),
        (["autoencoder.multipliers=[1,-2]"], "autoencoder.multipliers are"),
        (["reconstruction.regularisation=-1"], "reconstruction.regularisation is -1"),
        (["reconstruction.regularisation=nan"], "nan"),
        (["reconstruction.perceptual=inf"], "inf"),
        (["reconstruction.adversarial=-0.1"], "reconstruction.adversarial is -0.1"),
        (['reconstruction.features=""'], "names no CLIP for reconstruction.perceptual"),
        (["run.steps=900"], "adversarial_from is 900, and run.steps 900"),
        (["autoencoder.image_size=4"], "4 pixels are too small for the discriminator, which needs 6"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused_when_they_are_read(words, message):
    from clipkit.config import load_recipe
    from clipkit.train.autoencoder import AutoencoderRecipe

    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(AutoencoderRecipe, "emoji_autoencoder", words)
    assert len(str(error.value).splitlines()) == 1


def test_the_smallest_pictures_train_without_a_discriminator(packs, tmp_path):
    from clipkit.train import autoencoder

    words = [*TINY, *LATENT, f"data.shards={packs / 'train'}", "data.val=", "reconstruction.perceptual=0"]
    words += ["autoencoder.image_size=2", "reconstruction.adversarial=0", f"run.out={tmp_path / 'run'}"]
    autoencoder.run("emoji_autoencoder", [*words, "run.steps=1", "run.batch_size=4"])
    assert load_autoencoder(tmp_path / "run").config.latent_size == 1


def test_an_exact_picture_leaves_the_log_valid(packs, tmp_path, monkeypatch):
    from clipkit.config import load_recipe
    from clipkit.data.shards import Shards
    from clipkit.train.autoencoder import AutoencoderRecipe, Reconstruction

    words = [*LATENT, "reconstruction.perceptual=0", f"data.val={packs / 'heldout'}"]
    task = Reconstruction(load_recipe(AutoencoderRecipe, "emoji_autoencoder", words), Shards(packs / "train"))
    model, seen = task.model.autoencoder, []
    monkeypatch.setattr(model, "encode", lambda x: seen.append(x) or x)
    monkeypatch.setattr(model, "decode", lambda z: z if len(seen) % 2 else 0.5 * z)
    scores = task.evaluate(torch.device("cpu"))
    assert scores["exact"] == 32
    assert math.isfinite(scores["psnr"])
    monkeypatch.setattr(model, "decode", lambda z: z)
    scores = task.evaluate(torch.device("cpu"))
    assert scores["exact"] == 64
    assert "psnr" not in scores


def test_a_configuration_of_diffusers_with_odd_values_is_one_line(tmp_path):
    about = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "latent_channels": 4, "norm_num_groups": 4}
    about |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    for wrong in (
        {"block_out_channels": [0, 0]},
        {"block_out_channels": [8, 12]},
        {"block_out_channels": ["8", "16"]},
        {"latent_channels": None},
        {"latent_channels": "4"},
        {"layers_per_block": 0},
        {"norm_num_groups": 0},
        {"sample_size": [24, 32]},
        {"sample_size": 25},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**about, **wrong}))
        with pytest.raises(CheckpointError, match=r"config\.json") as error:
            from_diffusers(tmp_path)
        assert len(str(error.value).splitlines()) == 1
