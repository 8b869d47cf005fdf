import os

import pytest
import torch

from clipkit import checkpoint
from clipkit.errors import CheckpointError


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
