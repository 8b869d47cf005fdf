"""What a denoiser is trained with, beside the loop."""

import json

import torch
from worlds import TINY

from clipkit.guidance.draw import Studio
from clipkit.guidance.loading import load_denoiser
from clipkit.train import denoiser


def test_a_variance_is_learned_and_drawn_with(chain, packs, tmp_path):
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'denoiser'}", "diffusion.variance=learned"]
    denoiser.run("drawings_denoiser", [*words, "run.steps=12"])
    lines = [json.loads(line) for line in (tmp_path / "denoiser" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    for name in ("clip", "noisy_clip"):
        (tmp_path / name).symlink_to(chain / name)
    model = load_denoiser(tmp_path)
    fraction = model(torch.randn(1, 3, 24, 24), torch.tensor(0.0)).fraction
    assert not torch.allclose(fraction, torch.full_like(fraction, 0.5))
    drawn = Studio.open(tmp_path, "cpu").draw("a cat", n=2, steps=4, sampler="ddpm")
    assert drawn.images.isfinite().all()
