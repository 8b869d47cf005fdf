"""Atomic facts: how often pictures show each fact that their prompt states, by the renderer's exact judge.

Prompts are captions of the world's scenes (`clipkit.world`), pictures are checked without a network, and the score of a
kind of fact is the share of its facts that hold, with a 95 % interval. Atoms of prompts are from Soft-TIFA
(GenEval 2, arXiv 2512.16853); the judge is exact instead of a question-answering model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.guidance.config import SEEDS, DrawRequest, GuidanceConfig
from clipkit.guidance.pipeline import Pipeline
from clipkit.log import progress
from clipkit.world import Caption, Scene, captions, check, render, sample
from clipkit.world.scene import Kind

_Z = 1.959964
"""The normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Share:
    """`right` of `total` facts or prompts."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share that is right, in [0, 1]; NaN of none."""
        return self.right / self.total if self.total else math.nan

    def as_dict(self) -> dict[str, float]:
        """Share, counts and interval, for JSON."""
        low, high = self.interval
        return {"share": self.value, "right": self.right, "total": self.total, "low": low, "high": high}

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927); (0, 1) of none."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


@dataclass(frozen=True)
class Prompt:
    """A caption of a scene, and the scene, which the renderer draws for comparison."""

    caption: Caption
    scene: Scene


def prompts(n: int, split: str = "heldout", seed: int = 0, plain: bool = False) -> list[Prompt]:
    """`n` prompts, each a caption of a scene of a split of the world: a function of (split, seed, index).

    Every caption of a scene has the same chance; with `plain` it is of one object, in its colour, and states nothing
    else, for models that learned no more. Raises UsageError for n below 1, an unknown split, and a seed that leaves
    `draw` too few.
    """
    if n < 1:
        raise UsageError(f"{n} prompts were asked for; ask for at least one")
    _check_seeds(seed, n)
    if plain and split == "relations":
        raise UsageError("plain prompts name one object, and the relations split is of two; take another split")
    found: list[Prompt] = []
    index = 0
    while len(found) < n:
        scene = sample(split, seed, index)
        index += 1
        if plain and len(scene.objects) > 1:
            continue
        choices = captions(scene)
        pick = 0 if plain else int(np.random.default_rng([seed, index]).integers(len(choices)))
        found.append(Prompt(choices[pick], scene))
    return found


def draw(pipeline: Pipeline, asked: Sequence[Prompt], seed: int = 0, **options: Any) -> Tensor:
    """One picture of each prompt -> [N, 3, S, S] in [-1, 1]; picture i has the seed `seed` + i.

    `options` are `cfg_scale` and fields of `DrawRequest`. Raises UsageError as `Pipeline.draw` does.
    """
    _check_seeds(seed, len(asked))
    guidance = GuidanceConfig(options.pop("cfg_scale", None))
    images = []
    for i, prompt in enumerate(progress(asked, len(asked), "prompts")):
        request = DrawRequest({prompt.caption.text: 1.0}, n=1, seed=seed + i, guidance=guidance, **options)
        images.append(pipeline.draw(request).images)
    return torch.cat(images)


def _check_seeds(seed: int, n: int) -> None:
    """Raises UsageError unless `seed` to `seed` + n - 1 are seeds."""
    if not 0 <= seed <= SEEDS - n:
        raise UsageError(f"seed is {seed}; for {n} prompts, each with the next seed, it must be from 0 to {SEEDS - n}")


def renders(asked: Sequence[Prompt], size: int) -> list[Image.Image]:
    """The renderer's picture of each prompt's scene at `size` pixels; their score is the judge's accuracy."""
    return [render(prompt.scene, size).image for prompt in asked]


def score(asked: Sequence[Prompt], pictures: Sequence[Image.Image]) -> dict[str, Share]:
    """Kind of fact -> share of the prompts' facts that hold; "prompt" -> share of prompts all of whose facts hold.

    Picture i was drawn from prompt i.

    Raises UsageError when there are not as many pictures as prompts.
    """
    if len(asked) != len(pictures):
        raise UsageError(f"{len(pictures)} pictures were given for {len(asked)} prompts")
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    for prompt, picture in zip(asked, pictures, strict=True):
        holds = check(picture, prompt.caption.facts)
        for fact, true in holds.items():
            right[fact.kind] = right.get(fact.kind, 0) + true
            total[fact.kind] = total.get(fact.kind, 0) + 1
        right["prompt"] = right.get("prompt", 0) + all(holds.values())
        total["prompt"] = total.get("prompt", 0) + 1
    return {kind: Share(right[kind], total[kind]) for kind in (*get_args(Kind), "prompt") if kind in total}
