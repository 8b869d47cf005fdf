"""`clipkit demo`: the whole chain on the embedded drawings, from nothing to pictures drawn from prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from clipkit import distributed, log
from clipkit.data import drawings
from clipkit.data.manifest import is_pack
from clipkit.data.pack import pack
from clipkit.data.sources import drawings_source
from clipkit.models.pretrained import Pretrained, load
from clipkit.registry import TASKS, task_entry

PROMPTS = ("a red rocket", "a yellow star", "a blue fish", "a pink house")
_RUNS = {"clip": "clip", "judge": "clip", "denoiser": "denoiser", "noisy_clip": "noisy_clip"}
"""Run -> kind of its task."""
# Captions with condition dropout: the denoiser is unconditional too, so that the noise-aware CLIP alone can guide it.
_CONDITIONAL = ("condition.kind=text", "condition.dropout=0.4", "run.steps=1300")
_QUICK = ("run.steps=4", "run.batch_size=32", "optim.warmup=1", "run.log_every=2", "data.workers=0")


def run(out: Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Pack, pretrain (twice: the second CLIP only judges), train denoiser and noise-aware CLIP, draw -> the metrics.

    Everything is written into `out`; runs and packs that are there are not repeated.
    """
    began = time.perf_counter()
    packs = _pack(out, quick)
    for name, kind in _RUNS.items():
        words = [f"run.out={out / name}", f"run.seed={seed + (name == 'judge')}", f"data.shards={packs['train']}"]
        words += [f"data.val={packs['heldout']}"] if kind != "denoiser" else []
        words += [f"model.clip={out / 'clip'}"] if kind == "noisy_clip" else []
        words += [*_CONDITIONAL, f"condition.clip={out / 'clip'}"] if kind == "denoiser" else []
        TASKS[kind].run(task_entry(kind).example, [*words, *(_QUICK if quick else ())])
    metrics = {"seed": seed, **_score_clip(out, packs["heldout"]), **_draw(out, seed, quick)}
    _plot(out)
    metrics["minutes"] = round((time.perf_counter() - began) / 60, 2)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    _report(out, metrics)
    return metrics


def _pack(out: Path, quick: bool) -> dict[str, Path]:
    counts = {"train": 400 if quick else 12_000, "heldout": 64 if quick else 1600}
    packs = {split: out / "packs" / split for split in counts}
    for split, count in counts.items():
        if not is_pack(packs[split]):
            log.say(f"drawing and packing {count} {split} pictures")
            pack(drawings_source(split, count, drawings.SIZE, seed=0), packs[split])
    return packs


def _score_clip(out: Path, heldout: Path) -> dict[str, float]:
    """Zero-shot top-1 on drawings of held-out pairs, among all pairs."""
    from clipkit.data.shards import Shards
    from clipkit.zeroshot import classify, heads
    from clipkit.zeroshot.datasets import from_shards

    images, scores = from_shards("held-out pairs", Shards(heldout)), {}
    for name in ("clip", "judge"):
        clip = load(out / name)
        head = heads.class_head(clip.model, clip.tokenizer, images.classes, images.templates)
        scores[f"{name}_heldout_top1"] = round(classify.evaluate(clip.model, head, images).top1, 4)
    return scores


def _draw(out: Path, seed: int, quick: bool) -> dict[str, float]:
    """Draw every object and the four prompts, unguided and guided; the judge classifies the objects."""
    from clipkit.guidance.config import DEFAULT_SCALE
    from clipkit.guidance.pipeline import GuidanceConfig, Pipeline

    pipeline, judge, steps = Pipeline.open(out), load(out / "judge"), 3 if quick else 25
    objects, each = list(drawings.OBJECTS), 1 if quick else 8
    # Metric -> scale of the noise-aware CLIP, and of classifier-free guidance.
    scales = {
        "judge_names_unguided": (0.0, 0.0),
        "judge_names_guided": (DEFAULT_SCALE, 0.0),
        "judge_names_told": (DEFAULT_SCALE, 1.0),
    }
    right = dict.fromkeys(scales, 0)
    strips: dict[str, list[Tensor]] = {metric: [] for metric in scales}
    for metric, (scale, cfg_scale) in scales.items():
        how = GuidanceConfig(cfg_scale)
        for i, name in enumerate(log.progress(objects, len(objects), metric)):
            drawn = pipeline.draw(f"a {name}", n=each, steps=steps, scale=scale, seed=seed + i, guidance=how)
            right[metric] += named(judge, drawn.images).count(name)
        for prompt in PROMPTS:
            drawn = pipeline.draw(prompt, n=3, steps=steps, scale=scale, seed=seed, guidance=how)
            strips[metric].append(drawn.images)
    _comparison(strips).save(out / "grid.png")
    return {metric: round(n / (each * len(objects)), 4) for metric, n in right.items()}


@torch.no_grad()
def named(
    judge: Pretrained,
    images: Tensor,
    names: Sequence[str] = tuple(drawings.OBJECTS),
    templates: Sequence[str] = drawings.TEMPLATES,
) -> list[str]:
    """Which of `names` (the drawings' objects) the judge sees in each picture."""
    from clipkit.data.images import to_image
    from clipkit.zeroshot.heads import class_head

    head = class_head(judge.model, judge.tokenizer, names, templates)
    pixels = torch.stack([judge.preprocess(to_image(image)) for image in images]).to(head.device)
    return [names[i] for i in (judge.model.encode_image(pixels) @ head.T).argmax(dim=1).tolist()]


def _comparison(strips: dict[str, list[Tensor]]) -> Image.Image:
    """One row per prompt: its words, and its pictures at each scale."""
    from clipkit.guidance.image_grid import grid

    rows = [grid(torch.cat(of_prompt), columns=3 * len(strips)) for of_prompt in zip(*strips.values(), strict=True)]
    width, height, margin = rows[0].width, rows[0].height, 96
    sheet = Image.new("RGB", (margin + width, 18 + height * len(rows)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    heads = ("unguided", "guided by the noise-aware CLIP", "and conditional on the prompt")
    for i, head in enumerate(heads):
        pen.text((margin + (2 * i + 1) * width // (2 * len(heads)), 3), head, fill=(0, 0, 0), anchor="ma")
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        pen.text((4, 18 + i * height + height // 2 - 6), prompt, fill=(0, 0, 0))
        sheet.paste(row, (margin, 18 + i * height))
    return sheet


def _plot(out: Path) -> None:
    """loss.png: the loss of each run over its steps, drawn with Pillow so that the demo needs no extra."""
    sheet = Image.new("RGB", (4 * 240, 180), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(_RUNS):
        lines = [line for line in log.read(out / name / "log.jsonl") if "loss" in line]
        steps = [line["step"] for line in lines]
        losses = [line["loss"] for line in lines]
        low, high = min(losses), max(losses)
        x = [k * 240 + 20 + 200 * (s - steps[0]) / max(1, steps[-1] - steps[0]) for s in steps]
        y = [160 - 120 * (v - low) / max(1e-9, high - low) for v in losses]
        pen.line([(k * 240 + 20, 30), (k * 240 + 20, 160), (k * 240 + 225, 160)], fill=(140, 140, 140))
        pen.line(list(zip(x, y, strict=True)), fill=(36, 84, 210), width=2)
        pen.text((k * 240 + 24, 8), f"{name}: loss {losses[0]:.3g} to {losses[-1]:.3g}", fill=(0, 0, 0))
        pen.text((k * 240 + 150, 164), f"step {steps[-1]}", fill=(90, 90, 90))
    sheet.save(out / "loss.png")


def _report(out: Path, metrics: dict[str, Any]) -> None:
    device = distributed.choose_device()
    log.say(
        f"\nDone in {metrics['minutes']:.1f} minutes on {device}:\n"
        f"  zero-shot on held-out pairs: {metrics['clip_heldout_top1']:.1%} (chance {1 / len(drawings.PAIRS):.1%})\n"
        f"  the judge names the object in {metrics['judge_names_guided']:.1%} of what the noise-aware CLIP guided,\n"
        f"  in {metrics['judge_names_told']:.1%} where the denoiser is conditional on the prompt too, in "
        f"{metrics['judge_names_unguided']:.1%} of unguided ones (chance {1 / len(drawings.OBJECTS):.1%})\n"
        f"  look at {out / 'grid.png'} and {out / 'loss.png'}; more with\n"
        f'  clipkit guided-sample "a green cat" --model {out}'
    )
