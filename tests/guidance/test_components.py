"""A run draws with what it was trained with, wherever that lies now, and with nothing else."""

import copy
import json
import shutil

import pytest
import torch
from toy_distributions import TINY

from clipkit import checkpoint
from clipkit.checkpoint import half
from clipkit.convert.release import release
from clipkit.errors import CheckpointError, UsageError
from clipkit.guidance.components import load_guide_and_clip, load_parts
from clipkit.guidance.loading import load_autoencoder
from clipkit.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
from clipkit.guidance.pipeline import Pipeline
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.models.source import find


def rewritten(run, out, recipe=None, change=None, texts=None):
    """A copy of a run with other values in its recipe {section: {key: value}}, weights and files -> its folder."""
    found = checkpoint.latest(run)
    state, tensors = copy.deepcopy(found.state), found.tensors("ema")
    for section, values in (recipe or {}).items():
        state["recipe"][section].update(values)
    files = {p.name: p.read_text() for p in found.path.glob("*.json") if p.name not in ("state.json", "manifest.json")}
    files = {name: text for name, text in {**files, **(texts or {})}.items() if text is not None}
    out.mkdir(parents=True)
    checkpoint.save(out, state, {"ema": (change or (lambda t: t))(tensors)}, files, keep_last=1)
    return out


def shifted(tensors):
    """Weights of the same shapes, and others."""
    return {name: tensor + 0.25 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def alone(chain, packs, tmp_path_factory):
    """A folder with nothing but a denoiser that was told captions as `chain`'s CLIP reads them."""
    from clipkit.train import denoiser

    root = tmp_path_factory.mktemp("alone")
    words = [*TINY, f"data.shards={packs / 'train'}", "condition.kind=text", f"condition.clip={chain / 'clip'}"]
    denoiser.run("drawings_denoiser", [*words, f"run.out={root / 'denoiser'}"])
    return root


def test_a_run_by_itself_draws(alone, chain, monkeypatch, tmp_path, command):
    for path in (alone, alone / "denoiser"):
        parts = load_parts(path, "cpu")
        assert identity(parts.clip.model) == identity(load(chain, "cpu").model)
        assert parts.guide is None
    monkeypatch.chdir(alone / "denoiser")
    assert load_parts(".", "cpu").clip is not None  # its parent is found from within, too
    monkeypatch.chdir(tmp_path)
    code, out, err = command("guided-sample", "a red car", "--model", alone, "--n", 1, "--steps", 2, "--out", "o.png")
    assert code == 0, err
    assert "CLIP scores" in out


def test_a_run_is_found_beside_before_where_the_recipe_says(alone, chain, tmp_path, capsys):
    (tmp_path / "denoiser").symlink_to(alone / "denoiser")
    rewritten(chain / "clip", tmp_path / "clip", change=shifted)
    parts = load_parts(tmp_path / "denoiser", "cpu")
    assert identity(parts.clip.model) == identity(load(tmp_path, "cpu").model)
    said = capsys.readouterr().err
    assert f"is another than {chain / 'clip'}, which it was trained with" in said
    assert len(said.splitlines()) == 1
    load_parts(alone, "cpu")
    assert not capsys.readouterr().err


def test_paths_of_a_recipe_hold_as_recorded_and_as_seen_from_the_run(alone, chain, tmp_path, monkeypatch):
    recipe = {"run": {"out": "runs/mine/denoiser"}, "condition": {"clip": "runs/others/clip"}}
    moved = rewritten(alone / "denoiser", tmp_path / "moved" / "runs" / "mine" / "denoiser", recipe)
    for root in ("moved", "here"):  # moved with the tree, or where the command is run
        clip = tmp_path / root / "runs" / "others"
        clip.mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="needs a CLIP that scores its pictures; there is none in") as error:
            load_parts(moved, "cpu")
        assert str(tmp_path / "moved" / "runs" / "others" / "clip") in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        (clip / "clip").symlink_to(chain / "clip")
        monkeypatch.chdir(tmp_path / root)
        assert load_parts(moved, "cpu").clip is not None
        (clip / "clip").unlink()


def test_the_model_of_the_package_is_found_by_its_name(alone, tmp_path):
    run = rewritten(alone / "denoiser", tmp_path / "denoiser", {"condition": {"clip": "clipkit-tiny"}})
    assert identity(load_parts(run, "cpu").clip.model) == identity(load(device="cpu").model)


def test_a_denoiser_without_descriptions_says_that_it_needs_a_guide(chain, tmp_path, command):
    (tmp_path / "denoiser").symlink_to(chain / "denoiser")
    code, _, err = command("guided-sample", "a car", "--model", tmp_path / "denoiser", "--out", tmp_path / "o.png")
    assert code == 1
    assert "needs a noise-aware CLIP, as it was trained without descriptions; there is none in" in err
    assert len(err.splitlines()) == 1
    (tmp_path / "noisy_clip").symlink_to(chain / "noisy_clip")
    assert load_parts(tmp_path / "denoiser", "cpu").clip is not None  # the guide's recipe knows where the CLIP is


def test_a_guide_by_itself_has_its_curve(chain, packs, command):
    guide, clip = load_guide_and_clip(chain / "noisy_clip", "cpu")
    assert identity(guide.model.clip.text) == identity(clip.model.text)
    code, out, err = command("noise-curve", "--model", chain / "noisy_clip", "--shards", packs / "heldout", "--n", 2)
    assert code == 0, err
    assert "noise-aware" in out


def test_latents_are_of_one_autoencoder_alone(latent, tmp_path):
    (tmp_path / "denoiser").symlink_to(latent / "denoiser")
    (tmp_path / "noisy_clip").symlink_to(latent / "noisy_clip")
    assert load_parts(tmp_path / "denoiser", "cpu").autoencoder is not None  # where the recipe says
    other = rewritten(latent / "autoencoder", tmp_path / "autoencoder", change=shifted)
    found = load_parts(tmp_path, "cpu").autoencoder  # the right one rather than the nearer one
    assert found is not None
    assert identity(found) == identity(load_autoencoder(latent))
    run = rewritten(latent / "denoiser", tmp_path / "moved" / "denoiser", {"latent": {"autoencoder": str(other)}})
    right, wrong = (identity(load_autoencoder(path)) for path in (latent, other))
    with pytest.raises(CheckpointError) as error:
        Pipeline.open(run, "cpu")
    for part in (str(run), str(other), right, wrong, "is another autoencoder"):
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_scale_of_latents_is_part_of_the_autoencoder(latent):
    model = load_autoencoder(latent)
    before = identity(model)
    model.spread.mul_(1.001)
    assert identity(model) != before


def test_runs_older_than_the_record_are_checked_by_their_shapes(latent, tmp_path):
    old = {TRAINED_WITH: None}
    run = rewritten(latent / "denoiser", tmp_path / "denoiser", {"latent": {"autoencoder": "gone"}}, texts=old)
    rewritten(latent / "noisy_clip", tmp_path / "noisy_clip", texts=old)
    with pytest.raises(CheckpointError, match="needs the autoencoder of its latents; there is none in"):
        load_parts(run, "cpu")
    rewritten(latent / "autoencoder", tmp_path / "autoencoder", change=shifted)
    assert load_parts(run, "cpu").guide is not None
    shutil.rmtree(tmp_path / "autoencoder")
    larger = AutoencoderConfig(48, 8, (1, 2), 1, 3, groups=4)
    weights = {f"autoencoder.{name}": tensor for name, tensor in Autoencoder(larger).state_dict().items()}
    shape = {"autoencoder": {"image_size": 48, "latent_channels": 3}}
    rewritten(latent / "autoencoder", tmp_path / "autoencoder", shape, lambda tensors: weights)
    with pytest.raises(CheckpointError, match=r"draws latents of 4 x 12 x 12, the autoencoder .* of 3 x 24 x 24"):
        load_parts(run, "cpu")


def test_a_guide_of_other_latents_is_refused(latent, chain, tmp_path):
    record = json.dumps({"model.autoencoder": "0123456789abcdef"})
    (tmp_path / "denoiser").symlink_to(latent / "denoiser")
    guide = rewritten(latent / "noisy_clip", tmp_path / "noisy_clip", texts={TRAINED_WITH: record})
    with pytest.raises(CheckpointError, match=rf"{guide} was trained on latents of .*0123456789abcdef.*another one"):
        load_parts(tmp_path, "cpu")
    shutil.rmtree(guide)
    (tmp_path / "noisy_clip").symlink_to(chain / "noisy_clip")
    with pytest.raises(CheckpointError, match="sees 3 channels of pixels, the denoiser 4 of latents"):
        load_parts(tmp_path, "cpu")


def test_a_guide_that_does_not_fit_and_is_not_needed_is_said_and_left_out(alone, latent, tmp_path, capsys):
    (tmp_path / "denoiser").symlink_to(alone / "denoiser")
    (tmp_path / "noisy_clip").symlink_to(latent / "noisy_clip")
    pipeline = Pipeline.open(tmp_path, "cpu")
    said = capsys.readouterr().err
    assert "sees 4 channels of latents, the denoiser 3 of pixels" in said
    assert "it is omitted" in said
    assert pipeline.draw("a red car", n=1, steps=1).images.isfinite().all()
    with pytest.raises(UsageError):
        pipeline.draw("a red car", n=1, steps=1, scale=3.0)


def test_released_weights_are_the_same_models(latent, alone, tmp_path, monkeypatch, capsys):
    release(latent, tmp_path / "mine")
    parts = load_parts(tmp_path / "mine" / "denoiser", "cpu")
    assert parts.autoencoder is not None
    assert identity(parts.autoencoder) == identity(load_autoencoder(latent))
    assert parts.guide is not None
    shutil.rmtree(tmp_path / "mine" / "autoencoder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="needs the autoencoder of its latents"):
        load_parts(tmp_path / "mine", "cpu")
    release(alone, tmp_path / "told")
    release(latent / "clip", tmp_path / "told")
    load_parts(tmp_path / "told", "cpu")
    assert "another than" not in capsys.readouterr().err


def test_identity_is_that_of_what_release_keeps():
    model = Autoencoder(AutoencoderConfig(16, 8, (1, 2), 1, 3, "vq", codes=5, groups=4))
    before = identity(model)
    model.load_state_dict({name: half(tensor) for name, tensor in model.state_dict().items()})
    assert identity(model) == before
    with torch.no_grad():
        model.codebook.vectors[0, 0] += 1
    assert identity(model) != before


@pytest.mark.parametrize("kind", ["denoiser", "noisy_clip"])
def test_a_run_does_not_resume_with_other_models(kind, chain, packs, tmp_path):
    from clipkit.train import denoiser, noisy_clip

    clip = tmp_path / "clip"
    shutil.copytree(find(chain, "clip").path.parents[1], clip)
    key = "condition.clip" if kind == "denoiser" else "model.clip"
    words = [*TINY, f"data.shards={packs / 'train'}", "data.val=", f"{key}={clip}", f"run.out={tmp_path / kind}"]
    words += ["condition.kind=text"] if kind == "denoiser" else []
    run, recipe = (denoiser.run, "drawings_denoiser") if kind == "denoiser" else (noisy_clip.run, "drawings_noisy_clip")
    run(recipe, [*words, "run.steps=1"])
    shutil.rmtree(clip)
    rewritten(chain / "clip", clip, change=shifted)
    with pytest.raises(CheckpointError, match=f"was trained with another {key}: {clip} has changed since"):
        run(recipe, [*words, "run.steps=1"])


def test_a_run_inside_a_run_of_another_kind(alone, chain, tmp_path):
    """The folder above a denoiser may be a CLIP's run: that is no noise-aware CLIP."""
    shutil.copytree(chain / "clip", tmp_path / "clip")
    shutil.copytree(alone / "denoiser", tmp_path / "clip" / "denoiser")
    parts = load_parts(tmp_path / "clip" / "denoiser", "cpu")
    assert parts.guide is None
    assert identity(parts.clip.model) == identity(load(chain, "cpu").model)
