"""Shared fixtures: small packs of drawings, and one tiny chain of trained runs."""

from __future__ import annotations

import atexit
import os
import shutil
import site
import tempfile
from pathlib import Path

os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())
os.environ["HOME"] = tempfile.mkdtemp()  # what these tests keep is nobody else's
os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] + "/.cache"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from toy_distributions import LATENT, TINY

atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
torch.set_num_threads(1)
settings.register_profile("clipkit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("clipkit")


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="the fault matrix with its nightly counts (make faults)")


@pytest.fixture(scope="session")
def times(request):
    """times(push, nightly) -> how often a fault is injected: on every push, or under --nightly."""
    return lambda push, nightly: nightly if request.config.getoption("--nightly") else push


@pytest.fixture
def nightly(times):
    """For a test that takes long and asks for little that others have not asked for: it is skipped on a push."""
    if not times(0, 1):
        pytest.skip("nightly: make faults")


@pytest.fixture(scope="session")
def packs(tmp_path_factory) -> Path:
    """A folder with the packs `train` (240 drawings) and `heldout` (64)."""
    from clipkit.data.pack import pack
    from clipkit.data.sources import drawings_source

    folder = tmp_path_factory.mktemp("packs")
    pack(drawings_source("train", 240, 24, 0), folder / "train", shard_size=100)
    pack(drawings_source("heldout", 64, 24, 0), folder / "heldout")
    return folder


@pytest.fixture(scope="session")
def chain(packs, tmp_path_factory) -> Path:
    """A folder with the runs `clip`, `denoiser` and `noisy_clip`, each trained for four steps."""
    from clipkit.train import denoiser, noisy_clip, pretrain

    runs = tmp_path_factory.mktemp("chain")
    data = [*TINY, f"data.shards={packs / 'train'}"]
    val = f"data.val={packs / 'heldout'}"
    pretrain.run("drawings_clip", [*data, val, f"run.out={runs / 'clip'}"])
    denoiser.run("drawings_denoiser", [*data, f"run.out={runs / 'denoiser'}"])
    noisy_clip.run("drawings_noisy_clip", [*data, val, f"run.out={runs / 'noisy_clip'}", f"model.clip={runs / 'clip'}"])
    return runs


@pytest.fixture(scope="session")
def latent(chain, packs, tmp_path_factory) -> Path:
    """A folder with `clip`, and `autoencoder`, `denoiser` and `noisy_clip` of its latents, of four steps each."""
    from clipkit.train import autoencoder, denoiser, noisy_clip

    root = tmp_path_factory.mktemp("latent")
    data = [*TINY, f"data.shards={packs / 'train'}"]
    val, ours = f"data.val={packs / 'heldout'}", f"{root / 'autoencoder'}"
    judge = [f"reconstruction.features={chain / 'clip'}", "reconstruction.adversarial_from=2"]
    autoencoder.run("emoji_autoencoder", [*data, val, *LATENT, *judge, f"run.out={ours}"])
    shape = ["unet.image_size=12", "unet.patch_size=1", "unet.multipliers=[1,2]"]
    denoiser.run("drawings_denoiser", [*data, *shape, f"latent.autoencoder={ours}", f"run.out={root / 'denoiser'}"])
    tower = [f"model.autoencoder={ours}", "model.image_kwargs={channels=[8,16], depths=[1,1]}"]
    words = [*data, val, *tower, f"model.clip={chain / 'clip'}", f"run.out={root / 'noisy_clip'}"]
    noisy_clip.run("drawings_noisy_clip", words)
    (root / "clip").symlink_to(chain / "clip")
    return root


@pytest.fixture
def command(capsys):
    """Run the command line in this process -> (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        from clipkit.cli import main

        with pytest.raises(SystemExit) as stop:
            main([str(w) for w in words])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
