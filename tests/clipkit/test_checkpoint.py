import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit import checkpoint
from clipkit.errors import CheckpointError
from clipkit.io import sha256


def write(run, step, keep=3):
    tensors = {"model": {"w": torch.full((4,), float(step))}}
    return checkpoint.save(run, {"step": step, "kind": "clip"}, tensors, {"tokenizer.json": "{}"}, keep)


def test_round_trip(tmp_path):
    write(tmp_path, 5)
    found = checkpoint.latest(tmp_path)
    assert found.step == 5
    assert found.tensors("model")["w"].tolist() == [5.0] * 4
    assert found.text("tokenizer.json") == "{}"


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000010"]


def test_none_yet(tmp_path):
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 3] ^= 0x20
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"step-00000002.*falling back"):
        found = checkpoint.latest(tmp_path)
    assert found.step == 1


def test_all_damaged(tmp_path):
    (write(tmp_path, 1) / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="falling back"), pytest.raises(CheckpointError, match="0 bytes"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("point", ["fsync", "rename"])
def test_a_failure_while_writing_leaves_the_previous_one(tmp_path, monkeypatch, point):
    write(tmp_path, 1)

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if point == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr("pathlib.Path.rename", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).step == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_pickle_in_disguise_is_not_run(tmp_path):
    import pickle

    class Attack:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/attacked",))

    path = write(tmp_path, 1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Attack()))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError):
        checkpoint.latest(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_some_steps_are_kept_for_good(tmp_path):
    for step in range(1, 9):
        tensors = {"model": {"w": torch.zeros(2)}}
        checkpoint.save(tmp_path, {"step": step, "kind": "clip"}, tensors, {}, keep_last=1, keep_every=3)
    assert [int(p.name[-8:]) for p in sorted((tmp_path / "checkpoints").iterdir())] == [3, 6, 8]


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["../../../outside"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step-00000001/outside is missing"):
        checkpoint.verify(path)


FORMATS = sorted((Path(__file__).parents[1] / "fixtures").glob("checkpoint-format-*"))


@pytest.mark.parametrize("run", FORMATS, ids=lambda p: p.name)
def test_runs_of_every_format_keep_loading(run):
    """Made by a release, with the features its model gave then: `python tests/fixtures/make.py`."""
    import clipkit

    expected = load_file(run / "features.safetensors")
    clip = clipkit.load(run, "cpu")
    torch.testing.assert_close(clip.model.encode_image(expected["images"]), expected["image"], rtol=1e-5, atol=1e-6)
    text = clip.model.encode_text(clip.tokenizer(["a red rocket", "one blue fish"]))
    torch.testing.assert_close(text, expected["text"], rtol=1e-5, atol=1e-6)


def test_there_is_a_fixture_of_the_present_format():
    assert f"checkpoint-format-{checkpoint.FORMAT}" in {run.name for run in FORMATS}


def test_a_format_of_the_future_is_refused(tmp_path):
    path = write(tmp_path, 1)
    state = json.loads((path / "state.json").read_text()) | {"format": checkpoint.FORMAT + 1}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": (path / "state.json").stat().st_size, "sha256": sha256(path / "state.json")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"has format 2; this version of clipkit reads 1"):
        checkpoint.verify(path)


def _parts(run, step, of=3):
    """What three ranks write that hold rows of one matrix each, and a number that the first has alone."""
    matrix = torch.arange(21.0).view(7, 3) + step
    for rank, rows in reversed(list(enumerate(matrix.split([3, 3, 1])))):
        tensors = {"model": {"w": rows, **({} if rank else {"scale": torch.tensor(5.0)})}}
        yield (
            rank,
            lambda rank=rank, t=tensors: checkpoint.save(
                run, {"step": step, "kind": "clip"}, t, {"tokenizer.json": "{}"}, 2, shard=checkpoint.Shard(rank, of)
            ),
        )


def test_pieces_are_put_together(tmp_path):
    checkpoint.begin(tmp_path, 4)
    for rank, save in _parts(tmp_path, 4):  # the first rank comes last, and finds the others' parts
        assert checkpoint.latest(tmp_path) is None, rank
        save()
    found = checkpoint.latest(tmp_path)
    assert found.tensors("model")["w"].equal(torch.arange(21.0).view(7, 3) + 4)
    assert found.tensors("model")["scale"] == 5
    assert sorted(p.name for p in found.path.iterdir()) == [
        *("manifest.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
        *("model-00003-of-00003.safetensors", "state.json", "tokenizer.json"),
    ]
    (found.path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        checkpoint.verify(found.path)


def test_a_part_that_fails_fails_the_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)
    checkpoint.begin(tmp_path, 4)
    saves = dict(_parts(tmp_path, 4))
    saves[2]()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            saves[1]()
    with pytest.raises(CheckpointError, match="rank 1: No space left on device"):
        saves[0]()
    assert checkpoint.latest(tmp_path).step == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_part_that_does_not_come(tmp_path):
    aside = checkpoint.begin(tmp_path, 4)
    with pytest.raises(OSError, match="rank 1 did not write its shard in 0 s"):
        checkpoint._gathered(aside, checkpoint.Shard(0, 2), patience=0)
