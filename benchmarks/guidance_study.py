"""Which guidance draws what was asked for: every kind, over scales and steps, named by a CLIP that never guided.

    make guidance-study                      # clipkit demo first, then this on its runs
    python benchmarks/guidance_study.py --runs runs/demo --out runs/study
    python benchmarks/guidance_study.py --runs runs/tiny-imagenet --pack packs/tiny-imagenet --names goldfish,lemon,alp

A denoiser, told and untold; a prompt for each name ("a rocket" and so on), `--each` pictures of each. Per cell: the
share that the judge (another seed's CLIP) names right among the names, its CLIP score, the Frechet distance of the
pictures to real ones in its features, and the cost in unguided steps, all kinds timed in turns. `--runs` has clip,
denoiser, noisy_clip and judge; the classifier is trained into it if it is not there. Writes study.json, study.md,
study.png (pictures), scales.png and costs.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import clipkit
from clipkit import log
from clipkit.data import drawings
from clipkit.data.images import decode, to_image
from clipkit.data.shards import Shards
from clipkit.demo import named
from clipkit.guidance import samplers
from clipkit.guidance.denoiser import Denoise, Denoiser, clipped
from clipkit.guidance.guider_factories import clean_log_prob
from clipkit.guidance.guiders import LogProb, classifier_free, score_shift, through_x0
from clipkit.guidance.image_grid import grid
from clipkit.guidance.loading import load_classifier, load_denoiser
from clipkit.guidance.metrics.distributions import Moments, clip_score, frechet_distance
from clipkit.guidance.metrics.extractors import Extractor, clip_extractor
from clipkit.guidance.pipeline import DrawRequest, GuidanceConfig, Pipeline, picture
from clipkit.guidance.schedule import karras
from clipkit.models.pretrained import Pretrained
from clipkit.train import noisy_classifier

SCALES = (1.0, 3.0, 10.0, 30.0)
CFG_SCALES = (1.0, 2.0, 4.0, 8.0)
"""Of classifier-free guidance, whose 1 is none of it."""

Make = Callable[[int, float, Tensor], Denoise]
"""(number of the object, scale, lambdas) -> the guided denoiser."""


@dataclass(frozen=True)
class World:
    """What is asked for, and real pictures of it."""

    pack: Path
    names: list[str]
    templates: Sequence[str]
    classes: list[list[int]]
    """The classifier's numbers of each name."""
    real: list[tuple[Image.Image, str]]
    """With their names; the last of them, as many as are drawn, stand for what a perfect denoiser would draw."""

    def prompts(self) -> list[str]:
        """What is asked for, in words."""
        return [min(self.templates, key=len).format(name) for name in self.names]


def of_drawings(pack: Path, each: int) -> World:
    """The demo's sixteen objects in all colours."""
    names = list(drawings.OBJECTS)
    classes = [[i for i, (object_, _) in enumerate(drawings.PAIRS) if object_ == name] for name in names]
    drawn = [drawings.draw("train", seed, i) for seed, n in ((9, 250 * each), (10, 16 * each)) for i in range(n)]
    real = [(drawing.image, drawings.PAIRS[drawing.label][0]) for drawing in drawn]
    return World(pack, names, drawings.TEMPLATES, classes, real)


def of_pack(pack: Path, names: Sequence[str], each: int) -> World:
    """Some classes of a pack, each by one of its names."""
    shards = Shards(pack, verify=False)
    numbers = [next((i for i, known in enumerate(shards.classes) if name in known), -1) for name in names]
    if -1 in numbers:
        raise SystemExit(f"{pack} has no class {names[numbers.index(-1)]!r}")
    found: dict[int, list[tuple[Image.Image, str]]] = {number: [] for number in numbers}
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0)).tolist()
    for i in log.progress(order, len(order), "real pictures"):
        sample = shards.read(i)
        if sample.label in found and len(found[sample.label]) < 17 * each:
            found[sample.label].append((decode(sample.image), names[numbers.index(sample.label)]))
    real = [one for one_of_each in zip(*found.values(), strict=False) for one in one_of_each]
    if len(real) <= each * len(names):
        raise SystemExit(f"{pack} has no more than {each} pictures of a class; choose other names, or fewer of each")
    return World(pack, list(names), shards.templates, [[n] for n in numbers], real)


def prepare(runs: Path, pack: Path, words: Sequence[str]) -> None:
    """Train what may not be there: a classifier."""
    size = f"model.image_size={load_denoiser(runs).image_size}"
    words = [f"data.shards={pack}", f"model.clip={runs / 'clip'}", size, *words]
    noisy_classifier.run("drawings_noisy_classifier", [*words, f"run.out={runs / 'noisy_classifier'}"])


def object_log_prob(runs: Path, world: World) -> Callable[[int], LogProb]:
    """log p(name | x_t) by the classifier, which knows the drawings' names in each colour apart."""
    model, _ = load_classifier(runs / "noisy_classifier")
    return lambda number: lambda x, lam: model(x, lam)[:, world.classes[number]].logsumexp(dim=1)


def methods(runs: Path, world: World) -> dict[str, tuple[Make, Sequence[float]]]:
    """Name -> how the guided denoiser is made, and at which scales."""
    pipeline, classifier, prompts = Pipeline.open(runs), object_log_prob(runs, world), world.prompts()
    plain = pipeline.denoiser  # unconditional

    def noise_aware(denoise: Denoise, **how: Any) -> Make:
        def make(number: int, scale: float, lambdas: Tensor) -> Denoise:
            request = DrawRequest({prompts[number]: 1.0}, scale=scale, guidance=GuidanceConfig(**how))
            return pipeline.noise_aware(request, lambdas)(denoise)

        return make

    def on_x_t(number: int, scale: float, lambdas: Tensor) -> Denoise:
        log_p = clean_log_prob(pipeline, {prompts[number]: 1.0})
        return score_shift(lambda x, lam: log_p(x), scale)(plain)

    def free(number: int, scale: float, lambdas: Tensor) -> Denoise:
        return classifier_free(plain, scale)(plain.conditioned_on(prompts[number]))

    def free_and_noise_aware(number: int, scale: float, lambdas: Tensor) -> Denoise:
        return noise_aware(free(number, 2.0, lambdas))(number, scale, lambdas)

    return {
        "none": (lambda number, scale, lambdas: plain, (0.0,)),
        "clean CLIP on x_t": (on_x_t, SCALES),
        "clean CLIP through x0": (
            lambda n, scale, _: through_x0(clean_log_prob(pipeline, {prompts[n]: 1.0}), scale)(plain),
            SCALES,
        ),
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
def sample(make: Make, scale: float, steps: int, names: int, each: int, plain: Denoiser) -> Tensor:
    """`each` pictures of every name, the same noise for all methods: [names each, 3, S, S]."""
    lambdas, size, found = karras(*plain.lambda_range(), steps), plain.image_size, []
    for number in range(names):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(each, 3, size, size, generator=generator)
        found.append(samplers.dpmpp_2m(clipped(make(number, scale, lambdas)), x, lambdas))
    return torch.cat(found)


def features(extractor: Extractor, images: Sequence[Image.Image]) -> Tensor:
    """[len(images), D]."""
    pixels = torch.stack([extractor.preprocess(image) for image in images])
    return torch.cat([extractor.features(part) for part in torch.split(pixels, 200)])


def named_right(judge: Pretrained, images: Tensor, wanted: Sequence[str], world: World) -> float:
    """The share of pictures in which the judge sees what was wanted, among all the world's names."""
    found = named(judge, images, world.names, world.templates)
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def study(
    runs: Path, world: World, steps: Sequence[int], each: int, few: bool
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A row for each method, scale and number of steps; and the pictures of each method's best row."""
    judge, denoiser = clipkit.load(runs / "judge"), load_denoiser(runs)
    extractor, kinds, drawn = clip_extractor(judge, "judge"), methods(runs, world), len(world.names) * each
    real = [to_image(picture(image, denoiser.image_size)[0]) for image, _ in world.real]  # as coarse as the drawn ones
    known, floor = (Moments.of(features(extractor, part)) for part in (real[:-drawn], real[-drawn:]))
    wanted = [name for name in world.names for _ in range(each)]
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[float, Tensor]] = {}
    cost = costs(kinds, denoiser.image_size)
    cells = [
        (name, scale, n) for n in steps for name, (_, scales) in kinds.items() for scale in scales[: 1 if few else 9]
    ]
    with torch.no_grad():
        prompts = judge.model.encode_text(judge.tokenizer(world.prompts()))
    for name, scale, n in log.progress(cells, len(cells), "cells"):
        images = sample(kinds[name][0], scale, n, len(world.names), each, denoiser)
        looks = features(extractor, [to_image(image) for image in images])
        right = named_right(judge, images, wanted, world)
        row: dict[str, Any] = {"guidance": name, "scale": scale, "steps": n, "named right": right}
        row["CLIP score"] = clip_score(looks, prompts.repeat_interleave(each, dim=0))
        row["Frechet"] = frechet_distance(known, Moments.of(looks))
        row["cost"] = n * cost[name]
        rows.append(row)
        log.say(json.dumps(row))
        if name not in best or right > best[name][0]:
            best[name] = (right, images)
    last = torch.cat([picture(image, denoiser.image_size) for image in real[-drawn:]])
    right = named_right(judge, last, [name for _, name in world.real[-drawn:]], world)
    rows.append({"guidance": "real pictures", "named right": right, "Frechet": frechet_distance(known, floor)})
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
            lines.append(f"| {row['guidance']} | | | | {row['named right']:.1%} | | {row['Frechet']:.3f} |")
            continue
        lines.append(
            f"| {row['guidance']} | {row['steps']} | {row['cost']:.0f} | {row['scale']:g} | {row['named right']:.1%} | "
            f"{row['CLIP score']:.1f} | {row['Frechet']:.3f} |"
        )
    return "\n".join(lines)


def pictures(best: dict[str, Tensor], each: int) -> Image.Image:
    """A row for each method: one picture of each name."""
    strips = {name: grid(images[::each], columns=len(images) // each, scale=2) for name, images in best.items()}
    margin, height = 230, next(iter(strips.values())).height
    sheet = Image.new("RGB", (margin + next(iter(strips.values())).width, height * len(strips)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (name, strip) in enumerate(strips.items()):
        pen.text((6, i * height + height // 2 - 6), name, fill=(0, 0, 0))
        sheet.paste(strip, (margin, i * height))
    return sheet


def curves(rows: Sequence[dict[str, Any]], over: str, label: str, chance: float) -> Any:
    """Share named right over the column `over`, a line for each kind of guidance with several values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["guidance"] for row in rows if over in row):
        own = sorted((row for row in rows if row["guidance"] == name), key=lambda row: float(row[over]))
        if len(own) > 1:
            axes.plot([r[over] for r in own], [100 * r["named right"] for r in own], marker="o", label=name)
    axes.axhline(100 * chance, color="grey", linestyle=":", linewidth=0.8)
    axes.set(xscale="log", xlabel=label, ylabel="named right, %", ylim=(0, 102))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--pack", type=Path, help="a classed pack in place of the drawings")
    parser.add_argument("--names", default="", help="names of its classes, with commas")
    parser.add_argument("--each", type=int, default=8, help="pictures of each name")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--few", action="store_true", help="the first scale of each alone")
    parser.add_argument("--train", nargs="*", default=[], help="overrides for what is trained")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    options = parser.parse_args()
    if options.pack:
        world = of_pack(options.pack, options.names.split(","), options.each)
    else:
        world = of_drawings(options.runs / "packs" / "train", options.each)
    prepare(options.runs, world.pack, options.train)
    rows, best = study(options.runs, world, options.steps, options.each, options.few)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "study.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (options.out / "study.md").write_text(table(rows) + "\n", encoding="utf-8")
    pictures(best, options.each).save(options.out / "study.png")
    most = max(options.steps)
    long = [row for row in rows if row.get("steps") == most]
    chance = 1 / len(world.names)
    curves(long, "scale", f"scale, {most} steps", chance).savefig(options.out / "scales.png", dpi=110)
    label = "cost in unguided steps, best scale"
    curves(best_scales(rows), "cost", label, chance).savefig(options.out / "costs.png", dpi=110)
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
