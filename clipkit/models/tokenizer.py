"""Byte-pair tokenizer: CLIP's own vocabulary from its merges file, or one trained on a pack's captions.

Both share the cleaning, the pre-tokenization and the layout of Radford et al. 2021 (openai/CLIP): lower case, words cut
by CLIP's pattern, bytes as printable characters, `</w>` at the end of a word. Only the vocabulary differs. A tokenizer
of another kind that comes with published weights is used unchanged (`ExternalTokenizer`).

A caption is cleaned once, by the tokenizer's call. Tokenizers are picklable and small, for the loader's workers.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.data.captions import MAX_CAPTION
from clipkit.errors import CheckpointError, DataError, UsageError

START, END = "<|startoftext|>", "<|endoftext|>"
_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ASCII_WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+"
).findall  # the same, for lower-case ASCII
SMALLEST_VOCABULARY = 2 + 2 * 256
"""Tokens of a vocabulary without merges: START, END, each byte inside a word and at its end."""
_CLIP_MERGES = 49152 - 256 - 2
_REMEMBERED_WORDS = 500_000
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnyTokenizer(ABC):
    """Captions -> token ids [B, L], L being the longest caption of the batch, never more than `context_length`."""

    end_id: int
    pad_id: int = 0

    def __init__(self, encoder: Any, context_length: int) -> None:
        self._encoder, self.context_length = encoder, context_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._encoder.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary and merges; weights belong to one."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The tokenizer.json of the `tokenizers` library."""
        return str(self._encoder.to_str())

    @cached_property
    def key(self) -> str:
        """Equal for tokenizers that give the same ids for every caption."""
        cleaning = getattr(self, "_clean", clean).__name__
        return f"{self.fingerprint} {type(self).__name__} {self.context_length} {self.pad_id} {cleaning}"

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, special tokens included, at most `context_length` of them."""

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What `encode` returns -> int64 [B, L], filled with `pad_id`."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.full((len(rows), max(lengths, default=2)), self.pad_id, dtype=np.int64)
        inside = np.arange(ids.shape[1]) < lengths[:, None]  # [B, L]
        ids[inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
        return torch.from_numpy(ids)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """One caption or several -> int64 [B, L]."""
        return self.pad(self.encode([texts] if isinstance(texts, str) else texts))

    @abstractmethod
    def fitting(self, text: str) -> str:
        """The words of `text` that fit into the context whole; those after them are cut."""


def read_encoder(text: str) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises CheckpointError for what `tokenizers` does not read."""
    from tokenizers import Tokenizer as Encoder

    try:
        return Encoder.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"damaged tokenizer.json: {str(error)[:80]}") from None


def is_clip_like(encoder: Any) -> bool:
    """Whether it cuts captions as CLIP's does, whatever its vocabulary: `Tokenizer` is then used in its place."""
    from tokenizers import models

    model, words = encoder.model, encoder.pre_tokenizer
    return (
        isinstance(model, models.BPE)
        and model.end_of_word_suffix == "</w>"
        and words is not None
        and b"'re|'ve|'m|'ll|'d|[" in words.__getstate__()
        and encoder.token_to_id(START) is not None
        and encoder.token_to_id(END) is not None
    )


class ExternalTokenizer(AnyTokenizer):
    """The tokenizer of published weights, for instance SigLIP's sentencepiece, unchanged.

    Its tokenizer.json has the special tokens around a caption; rows shorter than the longest are filled with `pad_id`.
    """

    def __init__(self, encoder: Any, context_length: int, cleaning: str = "whitespace", pad_id: int = 0) -> None:
        super().__init__(encoder, context_length)
        encoder.enable_truncation(context_length)
        encoder.no_padding()
        self._clean, self.pad_id = _CLEANINGS[cleaning], pad_id
        self.end_id = int(encoder.encode("").ids[-1]) if encoder.encode("").ids else pad_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, with the special tokens of its own template."""
        return [e.ids for e in self._encoder.encode_batch([self._clean(text) for text in texts])]

    def fitting(self, text: str) -> str:
        """The words of `text` that fit into the context whole; those after them are cut."""
        words = text.split()
        while words and self._encoder.encode(self._clean(" ".join(words))).overflowing:
            words.pop()
        return " ".join(words)


def tokenizer_from_json(text: str, context_length: int, cleaning: str = "clip", pad_id: int = 0) -> AnyTokenizer:
    """The tokenizer of a tokenizer.json: a `Tokenizer` where it cuts captions as CLIP's does, else as it is.

    `cleaning` and `pad_id` are those of `Conventions`. Raises CheckpointError for a damaged file.
    """
    encoder = read_encoder(text)
    if cleaning == "clip" and is_clip_like(encoder):
        return Tokenizer.from_json(text, context_length)
    return ExternalTokenizer(encoder, context_length, cleaning, pad_id)


class Tokenizer(AnyTokenizer):
    """Byte-pair tokenizer, with CLIP's vocabulary or one that is trained on captions.

    A row is START, the caption's tokens, END, then zeros; a caption that does not fit is cut and still ends with END.
    The text of a special token inside a caption is ordinary text: no caption can end itself.
    """

    def __init__(self, encoder: Any, context_length: int = 77) -> None:
        super().__init__(encoder, context_length)
        self._words: dict[str, list[int]] = {}  # ids of words that were seen before
        start, end = encoder.token_to_id(START), encoder.token_to_id(END)
        if start is None or end is None:
            raise CheckpointError(f"tokenizer has no {START} or {END} token; it is not a clipkit or CLIP tokenizer")
        self.start_id, self.end_id = int(start), int(end)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, without the words seen so far, which may be many megabytes."""
        return {**self.__dict__, "_words": {}}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 4096, context_length: int = 77) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` from captions. Raises DataError without any."""
        from tokenizers import pre_tokenizers, trainers

        texts = [clean(c) for c in captions]
        if not any(texts):
            raise DataError("no captions to train a tokenizer on")
        encoder = _encoder({}, [])
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # The trainer numbers the word-final characters in the order of a hash map, another one each time; given to it
        # as special tokens they have fixed numbers, and ties between merges are broken alike in every run.
        fixed = [START, END, *(c + "</w>" for c in alphabet)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            special_tokens=fixed,
            show_progress=False,
        )
        encoder.train_from_iterator(texts, trainer)
        # Special tokens would be looked for in text; rebuilt from the vocabulary alone, the encoder has none.
        return cls.from_json(encoder.to_str(), context_length)

    @classmethod
    def clip(cls, merges: str | Path, context_length: int = 77) -> Tokenizer:
        """CLIP's vocabulary of 49,408 tokens from its file `bpe_simple_vocab_16e6.txt[.gz]`.

        Raises UsageError if the file is missing or is something else.
        """
        path = Path(merges)
        if not path.is_file():
            raise UsageError(f"no merges file at {path}; it is bpe_simple_vocab_16e6.txt.gz of the CLIP repository")
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8").split("\n")
        pairs = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1]]
        if len(pairs) != _CLIP_MERGES or any(len(p) != 2 for p in pairs):
            raise UsageError(f"{path} is not CLIP's merges file: {_CLIP_MERGES} lines of two tokens expected")
        characters = list(_byte_characters().values())
        tokens = [*characters, *(c + "</w>" for c in characters), *("".join(p) for p in pairs), START, END]
        return cls(_encoder({t: i for i, t in enumerate(tokens)}, [(p[0], p[1]) for p in pairs]), context_length)

    @classmethod
    def from_json(cls, text: str, context_length: int = 77) -> Tokenizer:
        """The tokenizer that `to_json` wrote. Raises CheckpointError for anything else."""
        import json

        try:
            model = json.loads(text)["model"]
            merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
            return cls(_encoder(model["vocab"], [(a, b) for a, b in merges]), context_length)
        except CheckpointError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(f"damaged tokenizer.json: {str(error)[:80]}") from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """START, the caption's tokens, END of each caption."""
        room = self.context_length - 2
        return [[self.start_id, *row[:room], self.end_id] for row in self._encode(texts)]

    def fitting(self, text: str) -> str:
        """The words of `text` that fit into the context whole; those after them are cut."""
        words, room = text.split(), self.context_length - 2
        ends = accumulate(map(len, self._encode(words)))
        return " ".join(words[: sum(end <= room for end in ends)])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: of plain ASCII word by word from memory, of anything else by the encoder."""
        if len(self._words) > _REMEMBERED_WORDS:
            self._words.clear()
        plain = [_ASCII_WORDS(t[:MAX_CAPTION].lower()) if _is_plain(t[:MAX_CAPTION]) else None for t in texts]
        remembered = self._words.__getitem__
        others = [clean(t) for t, found in zip(texts, plain, strict=True) if found is None]
        rest = iter(self._encode_all(others))
        try:
            rows = [None if found is None else list(chain.from_iterable(map(remembered, found))) for found in plain]
        except KeyError:
            unknown = list({w for found in plain if found is not None for w in found if w not in self._words})
            self._words.update(zip(unknown, self._encode_all(unknown), strict=True))
            rows = [None if found is None else list(chain.from_iterable(map(remembered, found))) for found in plain]
        return [next(rest) if row is None else row for row in rows]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._encoder.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and "&" not in text  # ftfy and html have nothing to repair


def clean(text: str) -> str:
    """CLIP's cleaning: ftfy, HTML entities, white space; at most 4,096 characters; lone surrogates become '?'."""
    return " ".join(_mend(text).split()).lower()


def whitespace(text: str) -> str:
    """open_clip's cleaning for other tokenizers: as `clean`, but letters keep their case."""
    return " ".join(_mend(text).split())


def canonical(text: str) -> str:
    """SigLIP's cleaning (big_vision, pp/ops_text.py): also without punctuation, an underscore being a space."""
    return " ".join(_mend(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def siglip(text: str) -> str:
    """transformers' cleaning for SigLIP (SiglipTokenizer.canonicalize_text): underscores are removed, not spaced."""
    return " ".join(_valid(text).lower().translate(_NO_PUNCTUATION).split())


def lower(text: str) -> str:
    """transformers' cleaning for SigLIP 2 (Siglip2Tokenizer): only lower case, letter by letter."""
    return "".join(map(str.lower, _valid(text)))


def _valid(text: str) -> str:
    return text[:MAX_CAPTION].encode("utf-8", errors="replace").decode("utf-8")


_CLEANINGS: dict[str, Callable[[str], str]] = {
    "clip": clean,
    "canonical": canonical,
    "whitespace": whitespace,
    "siglip": siglip,
    "lower": lower,
    "none": _valid,
}


def _mend(text: str) -> str:
    if not _is_plain(text := text[:MAX_CAPTION]):
        import ftfy

        text = ftfy.fix_text(_valid(text))
    return html.unescape(html.unescape(text))


def _encoder(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Encoder

    encoder = Encoder(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", fuse_unk=False))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return encoder


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
