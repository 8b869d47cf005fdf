"""Nothing that is loaded runs code: row 6 of docs/reliability.md."""

import io
import os
import pickle
import tarfile

import pytest
import torch

from clipkit import checkpoint, load
from clipkit.config import DataConfig
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, DataError


class Attack:
    """Unpickled, it leaves a file behind."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.fixture
def flag(tmp_path):
    """The file that must not appear; that the attack works is checked at the end."""
    path = tmp_path / "attacked"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Attack(path)))
    assert path.exists()


def test_a_pickle_as_a_model(tmp_path, flag, command):
    torch.save({"model": Attack(flag)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"it needs \w+\.system to be run, which clipkit does not"):
        load(tmp_path / "model.pt")
    code, _, err = command("zeroshot", "--model", tmp_path / "model.pt", "--dataset", f"folder:{tmp_path}")
    assert code in (1, 2)
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json", "manifest.json"])
def test_a_pickle_under_the_name_of_a_checkpoints_file(tmp_path, flag, name):
    tensors = {"model": {"w": torch.zeros(2)}, "ema": {"w": torch.zeros(2)}}
    path = checkpoint.save(tmp_path, {"step": 1, "kind": "clip"}, tensors, {}, 2)
    data = pickle.dumps(Attack(flag))
    (path / name).write_bytes(data)
    with pytest.warns(UserWarning, match="falling back"), pytest.raises(CheckpointError):
        checkpoint.latest(tmp_path)
    if name.endswith("safetensors"):  # and with a manifest that vouches for it
        import json

        from clipkit.io import sha256

        manifest = json.loads((path / "manifest.json").read_text())
        manifest[name] = {"bytes": len(data), "sha256": sha256(path / name)}
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=name):
            checkpoint.latest(tmp_path).tensors(name.removesuffix(".safetensors"))


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "jpg", "json"])
def test_a_pickle_as_a_member_of_a_shard(tmp_path, flag, suffix):
    data = pickle.dumps(Attack(flag))
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        for name, content in ((f"a.{suffix}", data), ("a.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    shards = Shards(tmp_path)
    if suffix not in ("jpg", "json"):
        assert shards.index["skipped"] == {"pickle": 1}
    with pytest.raises(DataError, match=r"no image|not an image"):
        list(Stream(shards, DataConfig("", workers=0), 16, 1, 0).batches(0, 1))


def test_a_pickle_as_the_offsets_of_a_shard(packs, tmp_path, flag):
    import shutil

    folder = shutil.copytree(packs / "heldout", tmp_path / "pack")
    expected = Shards(folder).read(3)
    (folder / "shard-000000.npy").write_bytes(pickle.dumps(Attack(flag)))
    assert Shards(folder).read(3) == expected
