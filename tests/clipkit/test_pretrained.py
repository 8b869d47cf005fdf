import pytest
import torch
from PIL import Image

import clipkit
from clipkit.errors import CheckpointError
from clipkit.pretrained import find


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
