"""guided-sample: pictures of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from clipkit import DEFAULT_MODEL
from clipkit.errors import UsageError

_SAMPLERS = ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "heun", "unipc", "ddim", "ddpm"]
_SPACINGS = ["karras", "linspace", "leading", "trailing"]


@click.command("guided-sample")
@click.argument("prompt")
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="Folder of the runs clip, denoiser, noisy_clip."
)
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option("--scale", type=float, default=None, help="Guidance scale; 0 is unguided.  [default: 10]")
@click.option("--sampler", type=click.Choice(_SAMPLERS), default="dpmpp-2m", show_default=True)
@click.option("--spacing", type=click.Choice(_SPACINGS), help="Of the steps.  [default: karras; ddim, ddpm: linspace]")
@click.option("--init", type=click.Path(path_type=Path), help="Begin with this picture; see --strength and --mask.")
@click.option("--strength", type=float, default=0.6, show_default=True, help="How much of --init is drawn anew.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Draw where this picture is white, keep --init elsewhere."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Keep the coarse shape of this picture.")
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
    spacing: str | None,
    init: Path | None,
    strength: float,
    mask: Path | None,
    reference: Path | None,
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
      clipkit guided-sample "a rocket" --gif rocket.gif
      clipkit guided-sample "a rocket" --model runs/drawings --init sketch.png --strength 0.7
    """
    from clipkit.guidance.draw import Studio, save_gif, save_grid

    studio = Studio.open(model, device)
    start, shape = _pictures(studio.denoiser.image_size, init, strength, mask, reference)
    drawn = studio.draw(
        prompt,
        n=n,
        steps=steps,
        scale=scale,
        sampler=sampler,
        negative=negative,
        seed=seed,
        spacing=spacing or "",
        start=start,
        reference=shape,
    )
    save_grid(drawn, out)
    if gif is not None:
        save_gif(drawn, gif)
    if as_json:
        click.echo(json.dumps({**drawn.about, "out": str(out), "clip_scores": drawn.scores}))
        return
    click.echo(f"{out}: {n} x {prompt!r}, guidance scale {drawn.about['scale']:g}, seed {seed}")
    click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))


def _pictures(
    size: int, init: Path | None, strength: float, mask: Path | None, reference: Path | None
) -> tuple[Any, Any]:
    """What to start with, and the reference, as the studio takes them."""
    from clipkit.guidance.draw import Start, picture
    from clipkit.zeroshot.similarity import read_images

    if mask is not None and init is None:
        raise UsageError("--mask says what of --init is drawn anew; give --init too")
    found = {path: picture(read_images([path])[0], size) for path in (init, mask, reference) if path is not None}
    shape = found[reference] if reference is not None else None
    if init is None:
        return None, shape
    where = (found[mask].mean(dim=1, keepdim=True) > 0).float() if mask is not None else None
    return Start(found[init], strength, where), shape
