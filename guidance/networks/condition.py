"""Conditioning of denoisers on classes or captions: class embedding, text encoder, condition dropout.

A description is a string: a caption, or a class's name; the empty one is unconditional. Condition dropout in training
makes the same network conditional and unconditional, as classifier-free guidance needs (Ho & Salimans 2022, arXiv
2207.12598).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.config import require
from clipkit.errors import RecipeError, UsageError, did_you_mean
from clipkit.models.clip import CLIP
from clipkit.models.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class ConditionConfig:
    """The condition that a denoiser is trained with."""

    kind: Literal["none", "class", "text"] = "none"
    """"class": the classes of a pack. "text": captions, encoded by a CLIP's frozen text encoder. "none":
    unconditional."""
    clip: str = ""
    """Run of the CLIP whose text encoder encodes the captions, for "text"."""
    dropout: float = 0.1
    """Condition dropout: fraction of the samples that are trained unconditionally, for classifier-free guidance."""
    width: int = 128
    """Width of the class embedding, for "class"."""

    def __post_init__(self) -> None:
        require("in [0, 1]", "condition", self, "dropout")
        require("at least 1", "condition", self, "width")
        if (self.kind == "text") != bool(self.clip):
            raise RecipeError('condition.clip names the CLIP that reads captions: give it with condition.kind = "text"')


class Condition(NamedTuple):
    """Input of the networks: a vector for each description, and for captions the tokens for cross-attention."""

    vector: Tensor
    """[B, V]."""
    tokens: Tensor | None = None
    """[B, L, V]."""
    mask: Tensor | None = None
    """Bool [B, L], False for padding."""

    def expand(self, rows: int) -> Condition:
        """One description's condition, repeated for `rows` pictures."""
        tokens, mask = (None if t is None else t.expand(rows, *t.shape[1:]) for t in (self.tokens, self.mask))
        return Condition(self.vector.expand(rows, -1), tokens, mask)


class ClassCondition(nn.Module):
    """Class conditioning: a learned embedding for each class, and one for the unconditional case."""

    cross_attention_dim = 0

    def __init__(self, classes: Sequence[Sequence[str]], width: int) -> None:
        super().__init__()
        self.classes, self.width = [list(names) for names in classes], width
        self.table = nn.Embedding(len(classes) + 1, width)
        self._numbers = {name.lower(): i for i, names in enumerate(self.classes) for name in names}

    def of_labels(self, labels: Tensor, dropped: Tensor) -> Condition:
        """The condition of class numbers [B]; unconditional where bool `dropped` [B] is True."""
        return Condition(self.table(labels.masked_fill(dropped, len(self.classes))))

    def forward(self, descriptions: Sequence[str]) -> Condition:
        """The condition of class names, in any case; "" is unconditional. Raises UsageError for an unknown name."""
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
    """Text conditioning: a CLIP's frozen text encoder, with its last states for cross-attention, and its embedding."""

    def __init__(self, clip: CLIP, tokenizer: AnyTokenizer, words: Sequence[str] = ()) -> None:
        super().__init__()
        self.words = words  # of the captions of the training; none if unknown
        self.tower, self.tokenizer, self.shape = clip.text, tokenizer, clip.config
        self.tower.requires_grad_(False)
        self.width = self.cross_attention_dim = clip.config.text_width

    def forward(self, descriptions: Sequence[str]) -> Condition:
        """Captions; the empty one means that there is no condition."""
        return self.of_tokens(self.tokenizer(list(descriptions)))

    def of_tokens(self, ids: Tensor) -> Condition:
        """Captions as token ids [B, L]."""
        with torch.no_grad():
            tokens, mask = self.tower.sequence(ids)
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
