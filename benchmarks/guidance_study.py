"""Which guidance draws what was asked for: every kind, over scales and steps, named by a CLIP that never guided.

    make guidance-study                      # clipkit demo first, then this on its runs
    python benchmarks/guidance_study.py --runs runs/demo --out runs/study

The drawings' denoiser, told and untold; sixteen prompts, "a rocket" and so on, `--each` pictures of each. Per cell: the
share that the judge (another seed's CLIP) names right among the sixteen objects, its CLIP score, the Frechet distance
of the pictures to drawings of the training's kind in its features, and the cost in unguided steps, all kinds timed in
turns. Trains the classifier into `--runs` if it is not there. Writes study.json, study.md, study.png (pictures),
scales.png and costs.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import clipkit
from clipkit import drawings, records
from clipkit.demo import named
from clipkit.guidance import samplers
from clipkit.guidance.denoiser import Denoise, clipped
from clipkit.guidance.draw import Steering, Studio, alternatives
from clipkit.guidance.extractors import Extractor, clip_extractor
from clipkit.guidance.guiders import LogProb, contrast, score_shift, softmax_log_prob, through_x0
from clipkit.guidance.loading import load_classifier, load_denoiser
from clipkit.guidance.metrics import Moments, clip_score, frechet_distance
from clipkit.guidance.schedule import karras
from clipkit.guidance.sheet import grid
from clipkit.images import to_image
from clipkit.train import noisy_classifier

OBJECTS = list(drawings.OBJECTS)
SCALES = (1.0, 3.0, 10.0, 30.0)
CFG_SCALES = (1.0, 2.0, 4.0, 8.0)
"""Of classifier-free guidance, whose 1 is none of it."""

Make = Callable[[int, float, Tensor], Denoise]
"""(number of the object, scale, lambdas) -> the guided denoiser."""


def prepare(runs: Path, words: Sequence[str]) -> None:
    """Train what the demo does not: a classifier."""
    places = [f"data.shards={runs / 'packs' / 'train'}", f"model.clip={runs / 'clip'}"]
    noisy_classifier.run("drawings_noisy_classifier", [*places, *words, f"run.out={runs / 'noisy_classifier'}"])


def clean_log_prob(studio: Studio, number: int) -> Callable[[Tensor], Tensor]:
    """log p(prompt | image) by the clean CLIP, among the same alternatives as the noise-aware one."""
    guide, model = studio.guide, studio.clip.model
    assert guide is not None
    prompt = prompt_of(number)
    texts = torch.cat([guide.embed([prompt]), guide.embed(alternatives(prompt, guide.bank))])

    def log_p(images: Tensor) -> Tensor:
        features = torch.nn.functional.normalize(model.image((images + 1) / 2).float(), dim=-1)
        return softmax_log_prob(features @ texts.T, model.logit_scale.expand(len(images)), 1)

    return log_p


def object_log_prob(runs: Path) -> Callable[[int], LogProb]:
    """log p(object | x_t) by the classifier, whose classes are (object, colour) pairs."""
    model, _ = load_classifier(runs / "noisy_classifier")

    def of(number: int) -> LogProb:
        own = [i for i, (name, _) in enumerate(drawings.PAIRS) if name == OBJECTS[number]]
        return lambda x, lam: model(x, lam)[:, own].logsumexp(dim=1)

    return of


def prompt_of(number: int) -> str:
    """What is asked for."""
    return f"a {OBJECTS[number]}"


def methods(runs: Path) -> dict[str, tuple[Make, Sequence[float]]]:
    """Name -> how the guided denoiser is made, and at which scales."""
    studio, classifier = Studio.open(runs), object_log_prob(runs)
    plain = studio.denoiser  # untold

    def noise_aware(denoise: Denoise, **how: Any) -> Make:
        def make(number: int, scale: float, lambdas: Tensor) -> Denoise:
            return studio.guided(denoise, {prompt_of(number): 1.0}, [], scale, Steering(**how), lambdas)

        return make

    def on_x_t(number: int, scale: float, lambdas: Tensor) -> Denoise:
        log_p = clean_log_prob(studio, number)
        return score_shift(lambda x, lam: log_p(x), scale)(plain)

    def free(number: int, scale: float, lambdas: Tensor) -> Denoise:
        return contrast(plain, scale)(plain.given(prompt_of(number)))

    def free_and_noise_aware(number: int, scale: float, lambdas: Tensor) -> Denoise:
        return noise_aware(free(number, 2.0, lambdas))(number, scale, lambdas)

    return {
        "none": (lambda number, scale, lambdas: plain, (0.0,)),
        "clean CLIP on x_t": (on_x_t, SCALES),
        "clean CLIP through x0": (lambda n, scale, _: through_x0(clean_log_prob(studio, n), scale)(plain), SCALES),
        "noise-aware CLIP": (noise_aware(plain), SCALES),
        "noise-aware CLIP, dot": (noise_aware(plain, objective="dot"), SCALES),
        "noise-aware CLIP, mean shift": (noise_aware(plain, shift="mean"), SCALES),
        "noise-aware classifier": (lambda n, scale, _: score_shift(classifier(n), scale)(plain), SCALES),
        "classifier-free": (free, CFG_SCALES),
        "classifier-free (2) + noise-aware CLIP": (free_and_noise_aware, SCALES),
    }


@torch.no_grad()
def costs(kinds: dict[str, tuple[Make, Sequence[float]]], size: int, rounds: int = 7) -> dict[str, float]:
    """What a step of each kind takes, in unguided ones: medians of turns, so that other work on the machine cancels."""
    x, lambdas = torch.randn(16, 3, size, size), karras(-4.0, 4.0, 3)
    made = {name: clipped(make(0, scales[-1], lambdas)) for name, (make, scales) in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, denoise in made.items():
            began = time.perf_counter()
            denoise(x, lambdas[1])
            seconds[name].append(time.perf_counter() - began)
    plain = seconds["none"][1:]
    return {n: statistics.median(a / b for a, b in zip(s[1:], plain, strict=True)) for n, s in seconds.items()}


@torch.no_grad()
def sample(make: Make, scale: float, steps: int, each: int, size: int, span: tuple[float, float]) -> Tensor:
    """`each` pictures of every object, the same noise for all methods: [16 each, 3, S, S]."""
    lambdas, found = karras(*span, steps), []
    for number in range(len(OBJECTS)):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(each, 3, size, size, generator=generator)
        found.append(samplers.dpmpp_2m(clipped(make(number, scale, lambdas)), x, lambdas))
    return torch.cat(found)


def features(extractor: Extractor, images: Tensor) -> Tensor:
    """Of pictures in [-1, 1]."""
    return extractor.features(torch.stack([extractor.preprocess(to_image(image)) for image in images]))


def study(runs: Path, steps: Sequence[int], each: int, few: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A row for each method, scale and number of steps; and the pictures of each method's best row."""
    judge = clipkit.load(runs / "judge")
    extractor, kinds, size = clip_extractor(judge, "judge"), methods(runs), load_denoiser(runs).image_size
    real = torch.stack([extractor.preprocess(drawings.draw("train", 9, i).image) for i in range(250 * each)])
    known = Moments.of(torch.cat([extractor.features(part) for part in torch.split(real, 200)]))
    floor = Moments.of(
        extractor.features(
            torch.stack([extractor.preprocess(drawings.draw("train", 10, i).image) for i in range(16 * each)])
        )
    )
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[float, Tensor]] = {}
    cost = costs(kinds, size)
    cells = [
        (name, scale, n) for n in steps for name, (_, scales) in kinds.items() for scale in scales[: 1 if few else 9]
    ]
    with torch.no_grad():
        prompts = judge.model.encode_text(judge.tokenizer([prompt_of(n) for n in range(len(OBJECTS))]))
    for name, scale, n in records.progress(cells, len(cells), "cells"):
        images = sample(kinds[name][0], scale, n, each, size, load_denoiser(runs).range())
        found, seen = named(judge, images), features(extractor, images)
        right = sum(a == b for a, b in zip(found, [o for o in OBJECTS for _ in range(each)], strict=True))
        row = {"guidance": name, "scale": scale, "steps": n, "named right": right / len(images)}
        row["CLIP score"] = clip_score(seen, prompts.repeat_interleave(each, dim=0))
        row["Frechet"] = frechet_distance(known, Moments.of(seen))
        row["cost"] = n * cost[name]
        rows.append(row)
        records.say(json.dumps(row))
        if name not in best or row["named right"] > best[name][0]:
            best[name] = (row["named right"], images)
    rows.append({"guidance": "real drawings", "Frechet": frechet_distance(known, floor)})
    return rows, {name: images for name, (_, images) in best.items()}


def best_scales(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method and number of steps the row with most named right."""
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["guidance"], row.get("steps", 0))
        if key not in chosen or row.get("named right", 0) > chosen[key].get("named right", 0):
            chosen[key] = row
    return list(chosen.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The best scale of each method for each number of steps, as Markdown."""
    lines = [
        "| guidance | steps | cost, unguided steps | best scale | named right | CLIP score | Frechet |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in best_scales(rows):
        if "steps" not in row:
            lines.append(f"| {row['guidance']} | | | | | | {row['Frechet']:.3f} |")
            continue
        lines.append(
            f"| {row['guidance']} | {row['steps']} | {row['cost']:.0f} | {row['scale']:g} | {row['named right']:.1%} | "
            f"{row['CLIP score']:.1f} | {row['Frechet']:.3f} |"
        )
    return "\n".join(lines)


def pictures(best: dict[str, Tensor], each: int) -> Image.Image:
    """A row for each method: one picture of each object."""
    strips = {name: grid(images[::each], columns=len(OBJECTS), scale=2) for name, images in best.items()}
    margin, height = 230, next(iter(strips.values())).height
    sheet = Image.new("RGB", (margin + next(iter(strips.values())).width, height * len(strips)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (name, strip) in enumerate(strips.items()):
        pen.text((6, i * height + height // 2 - 6), name, fill=(0, 0, 0))
        sheet.paste(strip, (margin, i * height))
    return sheet


def curves(rows: Sequence[dict[str, Any]], over: str, label: str) -> Any:
    """Share named right over the column `over`, a line for each kind of guidance with several values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["guidance"] for row in rows if over in row):
        own = sorted((row for row in rows if row["guidance"] == name), key=lambda row: float(row[over]))
        if len(own) > 1:
            axes.plot([r[over] for r in own], [100 * r["named right"] for r in own], marker="o", label=name)
    axes.axhline(100 / len(OBJECTS), color="grey", linestyle=":", linewidth=0.8)
    axes.set(xscale="log", xlabel=label, ylabel="named right, %", ylim=(0, 102))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--each", type=int, default=8, help="pictures of each object")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--few", action="store_true", help="the first scale of each alone")
    parser.add_argument("--train", nargs="*", default=[], help="overrides for what is trained")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    options = parser.parse_args()
    prepare(options.runs, options.train)
    rows, best = study(options.runs, options.steps, options.each, options.few)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "study.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (options.out / "study.md").write_text(table(rows) + "\n", encoding="utf-8")
    pictures(best, options.each).save(options.out / "study.png")
    most = max(options.steps)
    long = [row for row in rows if row.get("steps") == most]
    curves(long, "scale", f"scale, {most} steps").savefig(options.out / "scales.png", dpi=110)
    label = "cost in unguided steps, best scale"
    curves(best_scales(rows), "cost", label).savefig(options.out / "costs.png", dpi=110)
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
