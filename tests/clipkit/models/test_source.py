"""One model source: each name or place gives configuration, weights, tokenizer and vocabulary."""

import pytest
import torch
from published import CONVENTIONS, VIT_KWARGS, publish

import clipkit
from clipkit import checkpoint
from clipkit.errors import CheckpointError
from clipkit.models.source import open_source


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_a_published_folder(form, tmp_path):
    source = open_source(publish(tmp_path / form, form))
    assert source.config.conventions.image_mean == CONVENTIONS.image_mean
    assert source.config.conventions.text_activation == "quick_gelu"
    assert source.config.image_kwargs["embed_dim"] == VIT_KWARGS["embed_dim"]
    assert source.tokenizer.context_length == source.config.context_length == 16
    assert (source.words, source.checkpoint) == ((), None)
    model = source.build()
    assert model.text.tokens.num_embeddings == source.vocabulary == source.tokenizer.vocab_size
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.read().items())
    loaded = clipkit.load(tmp_path / form, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))


def test_a_run_and_the_packaged_model(chain):
    source = open_source(chain)
    assert source.checkpoint is not None
    assert source.place == source.checkpoint.path
    assert source.build().text.tokens.num_embeddings == source.vocabulary
    tiny = open_source("clipkit-tiny")
    assert {"red", "rocket"} <= set(tiny.words)
    assert tiny.name == "clipkit-tiny"


def test_only_the_files_that_are_read_are_hashed(chain, monkeypatch):
    hashed, sha256 = [], checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    source = open_source(chain)
    source.build()
    assert hashed.count("ema.safetensors") == 1
    assert not {"model.safetensors", "optimizer.safetensors"} & set(hashed)
    list(source.checkpoint.stream("model"))
    assert "model.safetensors" in hashed


def test_damage_is_found_when_the_file_is_read(chain, tmp_path):
    import shutil

    shutil.copytree(chain / "clip", tmp_path / "clip")
    file = open_source(tmp_path / "clip").place / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    source = open_source(tmp_path / "clip")  # reads the averaged weights alone, which are whole
    source.build()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its sha256 is not that of the manifest"):
        source.checkpoint.tensors("model")
    with pytest.warns(UserWarning, match=r"model\.safetensors is damaged.*falling back"):
        assert checkpoint.latest(tmp_path / "clip").step < source.checkpoint.step  # as training resumes
