"""Denoisers conditioned on classes or on captions, and unconditional ones."""

import json

import pytest
import torch
from toy_distributions import TINY

import clipkit
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError, UsageError
from clipkit.guidance.denoiser import Denoiser, DiffusionConfig
from clipkit.guidance.networks.condition import ClassCondition, Condition, ConditionConfig, TextCondition
from clipkit.guidance.networks.dit import DiT, DiTConfig
from clipkit.guidance.networks.unet import UNet, UNetConfig
from clipkit.guidance.pipeline import GuidanceConfig, Pipeline
from clipkit.models.words import words_of

NETWORKS = {
    "unet": UNetConfig(image_size=16, channels=16, multipliers=(1, 2), blocks=1),
    "dit": DiTConfig(image_size=16, width=32, depth=3, heads=2),
    "u-vit": DiTConfig(image_size=16, width=32, depth=3, heads=2, noise="token"),
}


def shaken(network):
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request):
    kind = UNet if isinstance(request.param, UNetConfig) else DiT
    return shaken(kind(request.param, 3, 24, 24))


def test_networks_hear_the_vector_and_every_word(network):
    x, lam = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    vector, tokens = torch.randn(1, 24, requires_grad=True), torch.randn(1, 5, 24, requires_grad=True)
    mask = torch.tensor([[True, True, True, False, False]])
    network(x, lam, Condition(vector, tokens, mask)).square().sum().backward()
    assert vector.grad.abs().min() > 0
    assert (tokens.grad[0, :3].abs().sum(dim=1) > 0).all()
    assert not tokens.grad[0, 3:].any()


def test_what_the_mask_hides_may_be_anything(network):
    x, lam, vector = torch.randn(2, 3, 16, 16), torch.tensor([0.5, -1.0]), torch.randn(2, 24)
    tokens, mask = torch.randn(2, 4, 24), torch.tensor([[True, True, False, False], [True, True, True, True]])
    other = torch.where(mask[..., None], tokens, torch.randn(2, 4, 24))
    found, again = (network(x, lam, Condition(vector, words, mask)) for words in (tokens, other))
    torch.testing.assert_close(found, again)
    longer = Condition(vector, torch.cat([tokens, torch.randn(2, 3, 24)], dim=1), torch.nn.functional.pad(mask, (0, 3)))
    torch.testing.assert_close(network(x, lam, longer), found)


def test_a_condition_starts_as_nothing():
    """So that a trained unconditional network may be taken further."""
    for config in NETWORKS.values():
        kind = UNet if isinstance(config, UNetConfig) else DiT
        network = kind(config, 3, 24, 0)
        torch.nn.init.normal_((network.head if kind is DiT else network.head[2]).weight)
        x, lam = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
        vectors = [Condition(torch.randn(1, 24)) for _ in range(2)]
        torch.testing.assert_close(network(x, lam, vectors[0]), network(x, lam, vectors[1]))


def test_classes_are_found_by_any_of_their_names():
    conditioner = ClassCondition([["rocket", "space rocket"], ["Cat"]], 8)
    table = conditioner.table.weight
    found = conditioner(["Space rocket", "cat", "", "rocket"]).vector
    torch.testing.assert_close(found, table[[0, 1, 2, 0]])
    with pytest.raises(UsageError, match=r"no class 'rockt' was trained.*rocket"):
        conditioner(["rockt"])
    labels, dropped = torch.tensor([1, 0]), torch.tensor([False, True])
    torch.testing.assert_close(conditioner.of_labels(labels, dropped).vector, table[[1, 2]])


def test_texts_are_read_as_the_tower_reads_them(chain):
    clip = clipkit.load(chain, "cpu")
    found = TextCondition(clip.model, clip.tokenizer)(["a red car", "a tree on the hill", ""])
    lengths = found.mask.sum(dim=1).tolist()
    assert lengths[2] == 2  # start and end
    assert lengths[0] < lengths[1] == found.tokens.shape[1]
    with torch.no_grad():
        embedded = clip.model.text(clip.tokenizer(["a red car", "a tree on the hill", ""]))
        torch.testing.assert_close(clip.model.text.projection(found.vector), embedded)
        alone = TextCondition(clip.model, clip.tokenizer)(["a red car"])
    torch.testing.assert_close(found.tokens[0, : lengths[0]], alone.tokens[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def conditioned(chain, packs, tmp_path_factory):
    """Runs of four steps of denoisers conditioned on captions and on classes."""
    from clipkit.train import denoiser

    root = tmp_path_factory.mktemp("conditioned")
    for kind, more in (("text", [f"condition.clip={chain / 'clip'}"]), ("class", ["condition.width=16"])):
        words = [
            *TINY,
            f"data.shards={packs / 'train'}",
            f"run.out={root / kind / 'denoiser'}",
            f"condition.kind={kind}",
        ]
        denoiser.run("drawings_denoiser", [*words, *more])
        (root / kind / "clip").symlink_to(chain / "clip")
    return root


@pytest.mark.parametrize(("kind", "prompt"), [("text", "a red rocket"), ("class", "red rocket")])
def test_a_conditioned_denoiser_draws_without_a_guide(conditioned, kind, prompt):
    pipeline = Pipeline.open(conditioned / kind, "cpu")
    assert pipeline.guide is None
    drawn = pipeline.draw(prompt, n=2, steps=3)
    assert drawn.about["cfg_scale"] == 2
    assert drawn.about["scale"] == 0
    strong = pipeline.draw(prompt, n=2, steps=3, guidance=GuidanceConfig(cfg_scale=8.0))
    assert not torch.equal(drawn.images, strong.images)
    with pytest.raises(UsageError, match="no noisy_clip run"):
        pipeline.draw(prompt, scale=3)


def test_a_conditioned_denoiser_knows_the_words_of_its_training(conditioned, packs):
    texts, classes = (Pipeline.open(conditioned / kind, "cpu") for kind in ("text", "class"))
    assert texts.unknown_words(["a red giraffe, please", "a fish"]) == ["giraffe", "please"]
    assert classes.unknown_words(["giraffe"]) == []  # another class is refused instead
    pack = Shards(packs / "train")
    assert {"rocket", "red", "background"} <= set(words_of([pack]))
    assert words_of([pack], limit=len(pack) - 1) == []  # of some of them nothing is known


def test_cfg_scale_zero_is_the_unconditional_denoiser_and_one_the_conditional(conditioned):
    pipeline = Pipeline.open(conditioned / "text", "cpu")
    x, lam = torch.randn(2, 3, 24, 24), torch.tensor(0.3)
    prompt = {"a red rocket": 1.0}
    torch.testing.assert_close(pipeline.conditional(prompt, [], 0.0)(x, lam).x0, pipeline.denoiser(x, lam).x0)
    torch.testing.assert_close(
        pipeline.conditional(prompt, [], 1.0)(x, lam).x0, pipeline.denoiser.conditioned_on("a red rocket")(x, lam).x0
    )
    away = pipeline.conditional(prompt, ["a cat"], 2.0)(x, lam).x0
    wanted, unwanted = (pipeline.denoiser.conditioned_on(text)(x, lam).x0 for text in ("a red rocket", "a cat"))
    torch.testing.assert_close(away, unwanted + 2 * (wanted - unwanted))


def test_the_text_tower_rests_and_is_kept(conditioned, chain):
    tower = Pipeline.open(conditioned / "text", "cpu").denoiser.conditioner.tower
    for name, tensor in clipkit.load(chain, "cpu").model.text.state_dict().items():
        assert torch.equal(tower.state_dict()[name], tensor)


def test_a_guide_and_descriptions_work_together(conditioned, chain, tmp_path):
    for name, source in (("denoiser", conditioned / "text"), ("clip", chain), ("noisy_clip", chain)):
        (tmp_path / name).symlink_to(source / name)
    pipeline = Pipeline.open(tmp_path, "cpu")
    alone, both = (pipeline.draw("a red rocket", n=1, steps=3, scale=scale).images for scale in (0, 5))
    assert not torch.equal(alone, both)


def test_what_does_not_go_together(chain, packs, conditioned):
    from clipkit.train import denoiser

    with pytest.raises(RecipeError, match=r"condition\.clip names the CLIP"):
        ConditionConfig("text")
    with pytest.raises(RecipeError, match=r"condition\.dropout is 2"):
        ConditionConfig(dropout=2)
    with pytest.raises(UsageError, match="trained without descriptions"):
        Denoiser(NETWORKS["unet"], DiffusionConfig()).conditioned_on("a cat")
    for cfg_scale in (0.0, 2.0):
        with pytest.raises(UsageError, match="omit the classifier-free scale"):
            Pipeline.open(chain, "cpu").draw("a cat", n=1, steps=1, guidance=GuidanceConfig(cfg_scale=cfg_scale))
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={conditioned / 'x'}", "condition.kind=class"]
    with pytest.raises(RecipeError, match=r"use condition\.kind = text"):
        denoiser.run("drawings_denoiser", [*words, f'data.mix={{"{packs / "heldout"}"=0.2}}'])
    recipe = json.loads(
        (conditioned / "text" / "denoiser" / "checkpoints" / "step-00000004" / "state.json").read_text()
    )
    assert recipe["recipe"]["condition"]["kind"] == "text"
