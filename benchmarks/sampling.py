"""Steps of sampling: what guidance costs, what samplers cost by themselves, and the U-Net beside diffusers'.

    python benchmarks/sampling.py [--json] [--model RUNS]

Each comparison runs in turns in one process, medians over rounds: a guided step of `--model` (by default clipkit-tiny)
over an unguided one, by the noise-aware CLIP and by the clean one through x0; microseconds a step of samplers whose
denoiser costs nothing, beside diffusers' schedulers; a forward pass of a U-Net beside UNet2DModel of the same widths
(needs the [parity] extra).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from clipkit import DEFAULT_MODEL
from clipkit.data.images import to_unit
from clipkit.guidance import samplers
from clipkit.guidance.denoiser import from_x0
from clipkit.guidance.guiders import through_x0
from clipkit.guidance.networks.unet import UNet, UNetConfig
from clipkit.guidance.pipeline import DrawRequest, Pipeline
from clipkit.guidance.schedule import karras


def medians(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if i:  # the first round warms up
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.no_grad()
def guided(model: str, batch: int, rounds: int) -> dict[str, float]:
    """Ratios to an unguided step."""
    pipeline = Pipeline.open(model)
    size = pipeline.denoiser.image_size
    x = torch.randn(batch, pipeline.denoiser.channels, size, size)
    lam, lambdas, clip = torch.tensor(0.0), karras(-9, 9, 25), pipeline.clip.model
    wanted = clip.encode_text(pipeline.clip.tokenizer("a rocket"))

    def likeness(x0: Tensor) -> Tensor:
        return (torch.nn.functional.normalize(clip.image(to_unit(x0)), dim=-1) @ wanted.T)[:, 0]

    noise_aware = pipeline.noise_aware(DrawRequest({"a rocket": 1.0}, scale=10.0), lambdas)(pipeline.denoiser)
    work = {
        "unguided": lambda: pipeline.denoiser(x, lam),
        "noise_aware": lambda: noise_aware(x, lam),
        "through_x0": lambda: through_x0(likeness, 10.0)(pipeline.denoiser)(x, lam),
        "through_x0_16_cutouts": lambda: through_x0(likeness, 10.0, cutouts=16)(pipeline.denoiser)(x, lam),
    }
    seconds = medians(work, rounds)
    return {f"{name}_over_unguided": seconds[name] / seconds["unguided"] for name in list(work)[1:]}


@torch.no_grad()
def overhead(steps: int, rounds: int) -> dict[str, float]:
    """Microseconds a step, the denoiser's own left out."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    x, lambdas = torch.randn(1, 3, 8, 8), karras(-9, 9, steps)
    nothing = from_x0(x, x, torch.zeros(1))

    def theirs(scheduler: type) -> Callable[[], object]:
        def run() -> None:
            made, sample = scheduler(), x
            made.set_timesteps(steps)
            for t in made.timesteps:
                sample = made.step(x, t, sample).prev_sample

        return run

    work: dict[str, Callable[[], object]] = {
        "clipkit_ddim": lambda: samplers.ddim(lambda x, lam: nothing, x, lambdas),
        "diffusers_ddim": theirs(DDIMScheduler),
        "clipkit_dpmpp_2m": lambda: samplers.dpmpp_2m(lambda x, lam: nothing, x, lambdas),
        "diffusers_dpmpp_2m": theirs(DPMSolverMultistepScheduler),
    }
    return {f"{name}_us": 1e6 * seconds / steps for name, seconds in medians(work, rounds).items()}


@torch.no_grad()
def networks(batch: int, rounds: int) -> dict[str, float]:
    """Seconds of a forward pass at 32 x 32, and the ratio."""
    from diffusers import UNet2DModel

    config = UNetConfig(32, 1, 64, (1, 2, 2), blocks=2, attention_from=1)
    ours = UNet(config).to(memory_format=torch.channels_last).eval()
    theirs = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x, lam, t = torch.randn(batch, 3, 32, 32), torch.zeros(batch), torch.zeros(batch)
    seconds = medians({"clipkit": lambda: ours(x, lam), "diffusers": lambda: theirs(x, t)}, rounds)
    counts = {
        f"unet_{name}_million": sum(p.numel() for p in network.parameters()) / 1e6
        for name, network in (("clipkit", ours), ("diffusers", theirs))
    }
    ratio = seconds["clipkit"] / seconds["diffusers"]
    return {**counts, **{f"unet_{name}_s": value for name, value in seconds.items()}, "unet_ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    result = {
        "threads": torch.get_num_threads(),
        **guided(options.model, options.batch, options.rounds),
        **overhead(options.steps, options.rounds),
        **networks(options.batch, options.rounds),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{k:32s} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
