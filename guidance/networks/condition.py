"""What a denoiser may be told about the picture: its class, its caption, or nothing.

A description is a string: a caption, or a class's name. The empty one says nothing; training drops descriptions at
random, so that the same network is also the unconditional one that classifier-free guidance needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.config import require
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError, UsageError, did_you_mean
from clipkit.models.clip import CLIP
from clipkit.models.tokenizer import Tokenizer
from clipkit.models.words import split


@dataclass(frozen=True)
class ConditionConfig:
    """What the denoiser is told in training."""

    kind: Literal["none", "class", "text"] = "none"
    """"class": a classed pack's classes. "text": captions, as a CLIP's frozen text tower understands them."""
    clip: str = ""
    """Run of the CLIP whose text tower reads the captions, for "text"."""
    dropout: float = 0.1
    """Condition dropout: fraction of the samples that are trained unconditionally, for classifier-free guidance."""
    width: int = 128
    """Width of a class's embedding."""

    def __post_init__(self) -> None:
        require("in [0, 1]", "condition", self, "dropout")
        require("at least 1", "condition", self, "width")
        if (self.kind == "text") != bool(self.clip):
            raise RecipeError('condition.clip names the CLIP that reads captions: give it with condition.kind = "text"')


class Condition(NamedTuple):
    """What networks see of descriptions: a vector each, and for texts their tokens, with a mask of which there are."""

    vector: Tensor
    """[B, V]."""
    tokens: Tensor | None = None
    """[B, L, V]."""
    mask: Tensor | None = None
    """Bool [B, L]."""

    def expand(self, rows: int) -> Condition:
        """One description's, for `rows` pictures."""
        tokens, mask = (None if t is None else t.expand(rows, *t.shape[1:]) for t in (self.tokens, self.mask))
        return Condition(self.vector.expand(rows, -1), tokens, mask)


class ClassCondition(nn.Module):
    """A learned vector for each class, and one for none."""

    words_width = 0

    def __init__(self, classes: Sequence[Sequence[str]], width: int) -> None:
        super().__init__()
        self.classes, self.width = [list(names) for names in classes], width
        self.table = nn.Embedding(len(classes) + 1, width)
        self._numbers = {name.lower(): i for i, names in enumerate(self.classes) for name in names}

    def of_labels(self, labels: Tensor, dropped: Tensor) -> Condition:
        """Class numbers [B], those marked in bool `dropped` [B] left out."""
        return Condition(self.table(labels.masked_fill(dropped, len(self.classes))))

    def forward(self, descriptions: Sequence[str]) -> Condition:
        """Any of a class's names, whatever its case. Raises UsageError for another."""
        numbers = [self._number(text.strip().lower()) for text in descriptions]
        return Condition(self.table(torch.tensor(numbers, device=self.table.weight.device)))

    def _number(self, name: str) -> int:
        if name and name not in self._numbers:
            raise UsageError(f"no class {name!r} was trained; {did_you_mean(name, self._numbers)}")
        return self._numbers[name] if name else len(self.classes)

    def texts(self) -> Mapping[str, str]:
        """Files that belong beside the weights."""
        return {"classes.json": json.dumps(self.classes, ensure_ascii=False)}


class TextCondition(nn.Module):
    """A CLIP's text tower, which is not trained: its last states for the attention, its embedding as the vector."""

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, words: Sequence[str] = ()) -> None:
        super().__init__()
        self.words = words  # of the captions that the denoiser was told in training; none if that is not known
        self.tower, self.tokenizer, self.shape = clip.text, tokenizer, clip.config
        self.tower.requires_grad_(False)
        self.width = self.words_width = clip.config.text_width

    def forward(self, descriptions: Sequence[str]) -> Condition:
        """Captions; those that are empty are read as such, which is what the network knows as "none"."""
        with torch.no_grad():
            tokens, mask = self.tower.sequence(self.tokenizer(list(descriptions)))
        last = mask.sum(dim=1) - 1
        return Condition(tokens[torch.arange(len(tokens)), last], tokens, mask)

    def texts(self) -> Mapping[str, str]:
        """Files that belong beside the weights."""
        import dataclasses

        return {
            "tokenizer.json": self.tokenizer.to_json(),
            "clip.json": json.dumps(dataclasses.asdict(self.shape)),
            "words.json": json.dumps(self.words, ensure_ascii=False),
        }


Conditioner = ClassCondition | TextCondition


def words_of(packs: Sequence[Shards], limit: int = 500_000) -> list[str]:
    """All words of the packs' captions, sorted; none if the samples are more than `limit`, or must be fetched."""
    if sum(map(len, packs)) > limit or any(pack.store.remote for pack in packs):
        return []
    return sorted({word for pack in packs for caption in pack.captions(limit) for word in split(caption)})
