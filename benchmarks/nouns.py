"""Common nouns drawn by a model and named by another: `python benchmarks/nouns.py --judge RUN [--model RUNS]`.

`--each` guided pictures of "a rocket" and nineteen others, and as many unguided ones; the judge is a CLIP that was
never used for guiding, and picks among the twenty. Prints the share that it names right, per noun and in all, and the
seconds that sixteen pictures take. Then the same for other names of the objects: those of the drawings' captions, and
some that are in no drawing's caption, but in those of the photographs that clipkit-tiny's CLIP was trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

import clipkit
from clipkit import DEFAULT_MODEL
from clipkit.data.drawings import ALIASES, OBJECTS
from clipkit.demo import named
from clipkit.guidance.image_grid import grid
from clipkit.guidance.pipeline import GuidanceConfig, Pipeline

NOUNS = (*OBJECTS, "clock", "crown", "camera", "pizza")
SECOND_NAMES = {aliases[0]: name for name, aliases in ALIASES.items()}
NEVER_TOLD = {
    "convertible": "car",
    "limousine": "car",
    "goose": "bird",
    "albatross": "bird",
    "tabby": "cat",
    "barn": "house",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--each", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float)
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--out", type=Path, help="also write a sheet of four pictures of each noun")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    pipeline, judge = Pipeline.open(options.model), clipkit.load(options.judge)
    right, seconds, shown = {}, 0.0, []

    def drawn(prompt: str, seed: int) -> Tensor:
        how = GuidanceConfig(options.cfg_scale)
        return pipeline.draw(
            f"a {prompt}", n=options.each, steps=options.steps, scale=options.scale, seed=seed, guidance=how
        ).images

    for i, noun in enumerate(NOUNS):
        began = time.perf_counter()
        images = drawn(noun, i)
        seconds += time.perf_counter() - began
        right[noun] = named(judge, images, NOUNS).count(noun) / options.each
        shown.append(images[:4])
    others = {
        kind: sum(named(judge, drawn(name, i), NOUNS).count(noun) for i, (name, noun) in enumerate(names.items()))
        / (options.each * len(names))
        for kind, names in (("second names", SECOND_NAMES), ("names never told", NEVER_TOLD))
    }
    unconditional = GuidanceConfig(None if pipeline.denoiser.conditioner is None else 0.0)
    blind = pipeline.draw(
        "a rocket", n=options.each * len(NOUNS), steps=options.steps, scale=0, guidance=unconditional
    ).images
    chance = [name == NOUNS[i // options.each] for i, name in enumerate(named(judge, blind, NOUNS))]
    result = {
        **right,
        "guided": sum(right.values()) / len(NOUNS),
        "unguided": sum(chance) / len(chance),
        **others,
        "seconds_for_16": 16 * seconds / (options.each * len(NOUNS)),
    }
    if options.out is not None:
        grid(torch.cat(shown), columns=16, scale=2).save(options.out)
    print(json.dumps(result) if options.json else "\n".join(f"{k:16s} {v:.3g}" for k, v in result.items()))


if __name__ == "__main__":
    main()
