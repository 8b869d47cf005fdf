"""Full disks and damaged checkpoints: rows 4 and 5 of docs/reliability.md."""

import contextlib
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from clipkit import checkpoint
from clipkit.errors import CheckpointError


def _save(run, step, size):
    torch.manual_seed(step)
    tensors = {"model": {"w": torch.randn(size), "b": torch.randn(3)}, "ema": {"w": torch.randn(size)}}
    return checkpoint.save(run, {"step": step, "kind": "clip"}, tensors, {"tokenizer.json": "{}"}, 5)


@contextlib.contextmanager
def _small_disk(path):
    """A file system of 1 MiB where we may mount one; else a limit of 256 KiB on the size of files."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(path)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, times):
    for repeat in range(times(2, 10)):
        disk = tmp_path / f"disk{repeat}"
        with _small_disk(disk):
            _save(disk, 1, 1000)
            with pytest.raises(CheckpointError, match=r"could not save .*step-00000002: .*MB free there") as error:
                _save(disk, 2, 150_000 + 40_000 * repeat)
            assert str(disk) in str(error.value)
            assert checkpoint.latest(disk).step == 1
            assert [p.name for p in (disk / "checkpoints").iterdir()] == ["step-00000001"]
            _save(disk, 3, 1000)  # and when there is room again it goes on
            assert checkpoint.latest(disk).step == 3


def test_a_limit_on_files_is_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    _save(tmp_path, 1, 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not save"):
            _save(tmp_path, 2, 90_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.latest(tmp_path).step == 1


def test_a_run_on_a_full_disk_says_so(packs, tmp_path):
    """In the background the save fails; the run stops with its message, and the checkpoint before is whole."""
    from process_faults import ended, tiny, training

    disk = tmp_path / "disk"
    with _small_disk(disk):
        (disk / "ballast").write_bytes(b"x" * (300 << 10))
        # No line of the log is due while the disk is full: the save is what fails.
        words = tiny(packs, disk / "run", 200, "run.keep_last=100", "run.log_every=200", "data.workers=0")
        assert ended(training(words, tmp_path / "err")) == 1
        said = (tmp_path / "err").read_text().splitlines()[-1]
        assert said.startswith(f"clipkit: could not save {disk}")
        assert "MB free there" in said
        assert checkpoint.latest(disk / "run").step > 0


def _damage(path: Path, chance: random.Random) -> str:
    """Spoil one file of a checkpoint at random -> its name."""
    file = chance.choice(sorted(path.iterdir()))
    data, kind = bytearray(file.read_bytes()), chance.choice(["flip", "cut", "remove", "empty", "longer"])
    if kind == "remove":
        file.unlink()
        return file.name
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes({"cut": data[: chance.randrange(len(data))], "empty": b"", "longer": data + b"x"}.get(kind, data))
    return file.name


def test_any_damage_is_found_and_named_and_the_one_before_is_used(tmp_path, times):
    chance = random.Random(0)
    _save(tmp_path / "sound", 1, 500)
    newest = _save(tmp_path / "sound", 2, 500)
    for _ in range(times(50, 2000)):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "sound", run)
        name = _damage(run / "checkpoints" / newest.name, chance)
        with pytest.warns(UserWarning, match=r"step-00000002.*falling back to the checkpoint before it") as warned:
            found = checkpoint.latest(run)
        assert found.step == 1
        # A flipped bit in the manifest shows as a file that is not as listed.
        assert name in str(warned[0].message) or name == "manifest.json"
