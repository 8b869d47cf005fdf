"""Guidance targets of prompts: which texts a CLIP prefers, and the negative captions that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clipkit.guidance.networks.noisy_clip import GuidanceTarget
from clipkit.models.words import EMPTY, split


def text_targets(
    embed: Callable[[Sequence[str]], Tensor],
    captions: Sequence[str],
    prompts: Mapping[str, float],
    negative: Sequence[str],
    dot: bool = False,
) -> list[GuidanceTarget]:
    """Targets of weighted prompts and of negative prompts, for a CLIP whose text encoder is `embed`: [N] -> [N, D].

    Each prompt is to be preferred to its negative captions and to the negative prompts. A second target then prefers
    everything else to the negative prompts. With `dot` a target is a cosine similarity (GLIDE, arXiv 2112.10741,
    section 3.2), with weight -1 for negative prompts.
    """
    targets = []
    for text, weight in prompts.items():
        wanted = embed([text])
        if dot:
            targets.append(GuidanceTarget(wanted, None, weight))
            continue
        others = embed([*alternatives(text, captions), *negative])
        targets.append(GuidanceTarget(wanted, others, weight))
        if negative:
            welcome = torch.cat([wanted, others[: -len(negative)]])
            targets.append(GuidanceTarget(welcome, embed(negative), weight))
    if dot:
        targets += [GuidanceTarget(embed([text]), None, -1.0) for text in negative]
    return targets


def alternatives(prompt: str, captions: Sequence[str]) -> list[str]:
    """The negative captions of a prompt: those that lack one of its content words.

    "a picture of a red rocket." is a case of "a rocket", not an alternative to it, and must not be pushed away from.
    """
    wanted = _words(prompt)
    return [c for c in captions if not wanted <= _words(c)]


def _words(text: str) -> set[str]:
    return set(split(text)) - EMPTY
