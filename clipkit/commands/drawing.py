"""guided-sample: pictures of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("guided-sample")
@click.argument("prompt")
@click.option("--model", required=True, help="Folder that holds the runs clip, denoiser and noisy_clip.")
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option("--scale", type=float, default=None, help="Guidance scale; 0 is unguided.  [default: 10]")
@click.option("--sampler", type=click.Choice(["dpmpp-2m", "ddim", "ddpm"]), default="dpmpp-2m", show_default=True)
@click.option("--negative", multiple=True, help="What the pictures should not show; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("grid.png"), show_default=True)
@click.option("--gif", type=click.Path(path_type=Path), help="Also write the denoising as an animation.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def guided_sample(
    prompt: str,
    model: str,
    n: int,
    steps: int,
    scale: float | None,
    sampler: str,
    negative: tuple[str, ...],
    seed: int,
    out: Path,
    gif: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw pictures of PROMPT: a denoiser steered by a noise-aware CLIP.

    Writes a PNG grid whose metadata holds prompt, seed, scale and version, and prints each picture's CLIP score. The
    same seed gives the same bytes on a CPU.

    \b
    Example:
      clipkit guided-sample "a rocket" --model runs/drawings --n 16 --gif rocket.gif
    """
    from clipkit.guidance.draw import Studio, save_gif, save_grid

    studio = Studio.open(model, device)
    drawn = studio.draw(prompt, n=n, steps=steps, scale=scale, sampler=sampler, negative=negative, seed=seed)
    save_grid(drawn, out)
    if gif is not None:
        save_gif(drawn, gif)
    if as_json:
        click.echo(json.dumps({**drawn.about, "out": str(out), "clip_scores": drawn.scores}))
        return
    click.echo(f"{out}: {n} x {prompt!r}, guidance scale {drawn.about['scale']:g}, seed {seed}")
    click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))
