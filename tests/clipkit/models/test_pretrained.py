import pytest
import torch
from PIL import Image

import clipkit
from clipkit.errors import CheckpointError
from clipkit.models.source import find


def test_load_gives_a_model_ready_to_use(chain):
    clip = clipkit.load(chain / "clip", "cpu")
    assert not clip.model.training
    pixels = clip.preprocess(Image.new("RGB", (50, 40), "red"))[None]
    with torch.no_grad():
        similarity = clip.model.encode_image(pixels) @ clip.model.encode_text(clip.tokenizer(["red", "a house"])).T
    assert similarity.shape == (1, 2)


def test_it_holds_the_averaged_weights(chain):
    found = find(chain, "clip")
    loaded = clipkit.load(chain, "cpu").model.state_dict()
    averaged, trained = found.tensors("ema"), found.tensors("model")
    assert all(torch.equal(loaded[n], t) for n, t in averaged.items())
    assert any(not torch.equal(averaged[n], trained[n]) for n in averaged)


def test_a_folder_of_runs_or_a_run(chain):
    assert find(chain, "denoiser").path == find(chain / "denoiser", "denoiser").path


def test_what_is_not_a_model(chain, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        clipkit.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no clip checkpoint"):
        clipkit.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a denoiser run; a clip run is needed"):
        clipkit.load(chain / "denoiser")


@pytest.mark.parametrize("name", ["m" * 300, "a/" * 3000, "a\nb", "x\0y", "./none", "~/none", "hf-hub:a\nb", "é" * 200])
def test_names_that_are_no_models_are_one_line(name, monkeypatch):
    monkeypatch.setattr("clipkit.convert.hub._reachable", lambda: False)
    with pytest.raises(CheckpointError) as error:
        clipkit.load(name)
    assert len(str(error.value)) < 400
    assert len(str(error.value).splitlines()) == 1
    for kind in ("clip", "denoiser"):
        with pytest.raises(CheckpointError, match="is not a model: it does not exist; give the folder of a training"):
            find(name, kind)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], "it is empty"),
        (["index.json", "part-00000.npy", "part-00000.json"], "it is an index of pictures, which `clipkit search`"),
        (["index.json", "shard-00000.tar"], "it is a pack of pictures and captions"),
        (["a.JPG"], "it is a folder of pictures"),
        (["model_index.json"], "it is a folder of diffusers"),
        (["model.safetensors"], "it has model.safetensors, but neither open_clip_config.json nor config.json"),
        (["pytorch_model.bin.index.json"], "it has pytorch_model.bin.index.json, but neither"),
        (["notes.txt", "todo.txt"], "it has notes.txt and 1 more"),
    ],
)
def test_folders_that_are_no_models_are_called_what_they_are(files, what, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"holds no clip checkpoint \({what}"):
        clipkit.load(tmp_path)
