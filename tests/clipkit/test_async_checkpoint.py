import errno

import pytest
import torch

from clipkit import checkpoint
from clipkit.async_checkpoint import Saver, lock
from clipkit.errors import CheckpointError


def test_a_saver_writes_what_was_there_when_it_was_told_to(tmp_path):
    weights = torch.zeros(100_000)
    with Saver(tmp_path, keep_last=3, keep_every=0) as saver:
        for step in (1, 2, 3):
            weights.fill_(step)
            saver.save({"step": step, "kind": "clip"}, {"model": {"w": weights}}, {"tokenizer.json": "{}"})
            weights.fill_(-1)  # the next step does not wait for the disk
    for step in (1, 2, 3):
        found = checkpoint.verify(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert found.tensors("model")["w"].unique().tolist() == [step]


def test_a_save_that_failed_is_heard_of(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("in the way")
    saver = Saver(tmp_path, 2, 0)
    saver.save({"step": 1, "kind": "clip"}, {"model": {"w": torch.zeros(2)}}, {})
    with pytest.raises(CheckpointError, match="could not save"):
        saver.wait()
    saver.check()  # once


def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("clipkit.async_checkpoint.fcntl.lockf", refuses)
    with pytest.raises(CheckpointError, match=r"cannot lock .*\.lock: No locks available"), lock(tmp_path):
        pass
