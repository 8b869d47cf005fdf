"""Weights to give away: smaller, alone, and as good."""

import json

import pytest
import torch

import clipkit
from clipkit import checkpoint
from clipkit.cli import cli
from clipkit.convert.release import release
from clipkit.errors import CheckpointError, UsageError
from clipkit.guidance.pipeline import Pipeline
from clipkit.models.source import find


def test_released_weights_load_by_their_folder_and_do_the_same(chain, tmp_path):
    folders = release(chain, tmp_path / "mine")
    assert [folder.parent.parent.name for folder in folders] == ["clip", "denoiser", "noisy_clip"]
    ours, theirs = clipkit.load(chain, "cpu"), clipkit.load(tmp_path / "mine", "cpu")
    pixels = torch.randint(0, 256, (4, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        agreement = (ours.model.encode_image(pixels) * theirs.model.encode_image(pixels)).sum(dim=1)
        assert agreement.min() > 0.9999
        words = ours.tokenizer("a red car")
        assert torch.equal(words, theirs.tokenizer("a red car"))
        assert (ours.model.encode_text(words) * theirs.model.encode_text(words)).sum() > 0.9999
    drawn = Pipeline.open(tmp_path / "mine", "cpu").draw("a red car", n=1, steps=2)
    same = Pipeline.open(chain, "cpu").draw("a red car", n=1, steps=2)
    assert (drawn.images - same.images).abs().max() < 0.05


def test_nothing_else_of_the_run_is_given_away(chain, tmp_path):
    (folder,) = release(chain / "clip", tmp_path / "mine")
    beside = {"manifest.json", "state.json", "tokenizer.json", "words.json"}
    assert {p.name for p in folder.iterdir()} == {"ema.safetensors", *beside}
    tensors = find(tmp_path / "mine", "clip").tensors("ema")
    assert {t.dtype for t in tensors.values() if t.ndim > 1} == {torch.float16}
    assert torch.float16 not in {t.dtype for t in tensors.values() if t.ndim < 2}
    assert str(chain.parent) in (find(chain, "clip").path / "state.json").read_text()
    state = (folder / "state.json").read_text()
    assert str(chain.parent) not in state
    assert json.loads(state)["recipe"]["data"]["shards"] == "train"


def test_a_flipped_bit_is_found(chain, tmp_path):
    (folder,) = release(chain / "clip", tmp_path / "mine")
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.warns(UserWarning, match="sha256"), pytest.raises(CheckpointError, match="safetensors is damaged"):
        clipkit.load(tmp_path / "mine", "cpu")


def test_the_command(chain, tmp_path, capsys):
    cli.main(["release", str(chain), str(tmp_path / "mine")], standalone_mode=False)
    assert capsys.readouterr().out.count(" MB") == 3
    with pytest.raises(CheckpointError, match="is not a run and holds none"):
        cli.main(["release", str(tmp_path), str(tmp_path / "other")], standalone_mode=False)
    assert not (tmp_path / "other").exists()


def test_a_release_is_not_mixed_into_something_else(chain, tmp_path):
    """Least of all into a run, whose checkpoints it would replace."""
    before = sorted(path for path in chain.rglob("*"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "clip.txt").write_text("mine")
    for out, there in ((chain, "clip"), (chain / "clip", r"\.lock"), (tmp_path / "notes", r"clip\.txt")):
        with pytest.raises(
            UsageError, match=f"holds {there}, which is no release; give a new folder, or one of releases"
        ):
            release(chain / "clip", out)
    assert sorted(path for path in chain.rglob("*")) == before


def test_releases_are_put_together_and_replaced(chain, tmp_path):
    """Kind by kind, as clipkit-tiny is made; also by a run of fewer steps than the one before."""
    release(chain / "clip", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("a card")
    release(chain / "denoiser", tmp_path / "mine")
    latest = find(tmp_path / "mine", "clip")
    former = latest.path.rename(latest.path.with_name("step-99999999"))
    assert former.is_dir()
    (folder,) = release(chain / "clip", tmp_path / "mine")
    assert find(tmp_path / "mine", "clip").path == folder == latest.path
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["README.md", "clip", "denoiser"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_nothing_half_written_stays(chain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"cannot write into .*out: Not a directory"):
        release(chain, tmp_path / "file" / "out")
    save = checkpoint.save

    def fails_second(run, state, *rest, **named):
        if state["kind"] == "denoiser":
            raise CheckpointError("could not save")
        return save(run, state, *rest, **named)

    monkeypatch.setattr(checkpoint, "save", fails_second)
    with pytest.raises(CheckpointError, match="could not save"):
        release(chain, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_released_weights_are_smaller(chain, tmp_path):
    (folder,) = release(chain / "denoiser", tmp_path / "mine")
    whole = find(chain, "denoiser").path
    assert (folder / "ema.safetensors").stat().st_size < 0.52 * (whole / "ema.safetensors").stat().st_size
    assert json.loads((folder / "state.json").read_text())["recipe"]["run"]["steps"] == 4
