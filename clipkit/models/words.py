"""Vocabulary of captions and prompts: words of a prompt that a model was not trained on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.data.shards import Shards

CAPTIONS = 500_000
"""Most samples of packs whose captions are read for a vocabulary."""
EMPTY = frozenset(["a", "an", "the", "one", "of", "in", "on", "with", "photo", "picture", "image", "drawing"])
"""Words that do not describe the content of a picture."""
_WORD_OR_SYMBOLS = re.compile(r"\w+|[^\w\s\x00-\x7f]+")


def split(text: str) -> list[str]:
    """A text's words in lower case, in their order; a run of emoji or other symbols beyond ASCII is a word too."""
    found = _WORD_OR_SYMBOLS.findall(unicodedata.normalize("NFC", text).lower())
    # Quotation marks, dashes and combining marks are no words.
    return [word for word in found if word.isascii() or any(unicodedata.category(c)[0] in "LNS" for c in word)]


def words_of(packs: Sequence[Shards], limit: int = CAPTIONS) -> list[str]:
    """The words of the packs' captions, sorted; none for more than `limit` samples, or remote packs."""
    if sum(map(len, packs)) > limit or any(pack.store.remote for pack in packs):
        return []
    return sorted({word for pack in packs for caption in pack.captions(limit) for word in split(caption)})


def unknown(texts: Iterable[str], known: Sequence[str]) -> list[str]:
    """Words of `texts` that are not among `known`, the words of all captions that a model was trained on, each once.

    None when `known` is empty: the model did not record its captions' words.
    """
    if not known:
        return []
    words = EMPTY.union(known)
    return [word for word in dict.fromkeys(word for text in texts for word in split(text)) if word not in words]
