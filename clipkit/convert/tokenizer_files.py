"""Tokenizer files of published models: tokenizer.json, tokenizer_config.json, special_tokens_map.json.

They say how captions are cut, cleaned, padded and delimited. A setting that clipkit does not have is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.convert.processors import known
from clipkit.errors import CheckpointError, shown
from clipkit.io import read_object, write_atomically
from clipkit.models.clip import Conventions
from clipkit.models.tokenizer import END, START, AnyTokenizer, Tokenizer, is_clip_like, read_encoder

CLIP_VOCABULARY = 49408
"""Tokens of CLIP's own vocabulary, the last of which ends a caption."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer beside somebody's weights; by default CLIP's own vocabulary."""

    text: str = ""
    """Its tokenizer.json; none for CLIP's own."""
    encoder: Any = None
    """That, read by the `tokenizers` library."""
    clip_like: bool = True
    """Whether it cuts captions as CLIP's does."""
    kind: str = ""
    """Class that transformers reads it with."""
    end_id: int = CLIP_VOCABULARY - 1
    """Token after a caption."""
    size: int = CLIP_VOCABULARY
    """Its tokens."""
    pad_id: int | None = None
    """Token that fills a batch, where something names it."""
    longest: int | None = None
    """Most tokens of a caption, where something says it."""


CLIP_TOKENIZER = TokenizerFiles()
"""CLIP's own vocabulary, where no tokenizer.json lies beside the weights."""


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The folder's tokenizer.json, with the settings of tokenizer_config.json and special_tokens_map.json.

    Raises CheckpointError where they contradict each other, and for settings that clipkit does not have.
    """
    if not (folder / "tokenizer.json").is_file():
        return CLIP_TOKENIZER
    text = _text(folder / "tokenizer.json")
    encoder = read_encoder(text)
    settings, tokens = (
        read_object(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    clip_like, around = is_clip_like(encoder), encoder.encode("").ids
    end = encoder.token_to_id(END) if clip_like else (around or [-1])[-1]
    if not clip_like:
        _check_settings(settings, {**tokens, **settings}, encoder, around)
    longest = settings.get("model_max_length")
    return TokenizerFiles(
        text=text,
        encoder=encoder,
        clip_like=clip_like,
        kind=str(settings.get("tokenizer_class") or ""),
        end_id=int(end),
        size=int(encoder.get_vocab_size()),
        pad_id=_pad_id(settings, tokens, encoder),
        longest=int(longest) if isinstance(longest, (int, float)) and longest >= 1 else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is not UTF-8") from None


def _content(token: Any) -> str | None:
    """A token's text; newer files have an object around it."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _pad_id(settings: Mapping[str, Any], tokens: Mapping[str, Any], encoder: Any) -> int | None:
    named = {
        "tokenizer_config.json": _content(settings.get("pad_token")),
        "special_tokens_map.json": _content(tokens.get("pad_token")),
        "tokenizer.json": (encoder.padding or {}).get("pad_token"),
    }
    named = {file: token for file, token in named.items() if token is not None}
    for file, token in named.items():
        if encoder.token_to_id(token) is None:
            raise CheckpointError(f"{file} pads with {shown(repr(token))}, which is no token of tokenizer.json")
    if len(set(named.values())) > 1:
        said = ", ".join(f"{token!r} in {file}" for file, token in named.items())
        raise CheckpointError(f"the token that pads captions is {shown(said)}; correct what is wrong")
    return int(encoder.token_to_id(next(iter(named.values())))) if named else None


def _check_settings(settings: Mapping[str, Any], tokens: Mapping[str, Any], encoder: Any, around: list[int]) -> None:
    """Check that captions are padded and cut at the right, and have the special tokens that the settings ask for."""
    for name, side in (
        *((key, settings.get(key)) for key in ("padding_side", "truncation_side")),
        ("padding of tokenizer.json", (encoder.padding or {}).get("direction")),
        ("truncation of tokenizer.json", (encoder.truncation or {}).get("direction")),
    ):
        if side not in (None, "right"):
            raise CheckpointError(f"tokenizer_config.json: {name} {side!r} is not supported; it must be 'right'")
    for key, value in (("do_lower_case", True), ("auto_map", None)):
        if settings.get(key, value) != value:
            raise CheckpointError(f"tokenizer_config.json: {key} {shown(repr(settings[key]))} is not supported")
    for which, place in (("bos", 0), ("eos", -1)):
        token = _content(tokens.get(f"{which}_token"))
        stands = bool(around) and token is not None and around[place] == encoder.token_to_id(token)
        if settings.get(f"add_{which}_token") not in (None, stands):
            raise CheckpointError(
                f"tokenizer_config.json says add_{which}_token {settings[f'add_{which}_token']}, and tokenizer.json "
                f"{'adds it' if stands else 'does not add it'}; correct what is wrong"
            )


def padding(files: TokenizerFiles, stated: int | None, where: str) -> int:
    """The token that fills captions: the tokenizer's, with which the configuration must agree if it states one."""
    if files.pad_id is None and stated is None:
        raise CheckpointError("nothing names the token that pads captions; tokenizer_config.json needs its pad_token")
    if files.pad_id is not None and stated is not None and stated != files.pad_id:
        raise CheckpointError(f"{where} is {stated}, and the tokenizer pads with {files.pad_id}; correct what is wrong")
    return files.pad_id if files.pad_id is not None else int(stated or 0)


# Classes of transformers -> their cleaning of captions before tokenizer.json is applied. Those of sentencepiece do it
# in Python; SigLIP 2 was trained in lower case, which Gemma's tokenizer does not know of.
_CLEANINGS = {
    "": "siglip",
    "SiglipTokenizer": "siglip",
    "Siglip2Tokenizer": "lower",
    "GemmaTokenizer": "lower",
    "PreTrainedTokenizer": "none",
    "TokenizersBackend": "none",
    "T5Tokenizer": "none",
}


def siglip_cleaning(files: TokenizerFiles) -> str:
    """What transformers does to captions of a SigLIP. Raises CheckpointError for classes that are not known here."""
    return known(files.kind.removesuffix("Fast"), _CLEANINGS, "tokenizer_config.json: tokenizer_class")


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_SPACES = (_replace(r"[\s\x1c-\x1f]+", " "), {"type": "Strip", "strip_left": True, "strip_right": True})
_LOWER, _PUNCTUATION = {"type": "Lowercase"}, _replace(r"[!-/:-@\[-`{-~]", "")
# The repairs of ftfy that concern single characters; a tokenizer.json has no rule for its others.
_MENDED = ({"type": "NFC"}, _replace("[\u2018-\u201b\u02bc]", "'"), _replace("[\u201c-\u201f]", '"'))
_NORMALIZERS: dict[str, tuple[dict[str, Any], ...]] = {
    "clip": (*_MENDED, *_SPACES, _LOWER),
    "whitespace": (*_MENDED, *_SPACES),
    "canonical": (*_MENDED, _replace("_", " "), _PUNCTUATION, _LOWER, *_SPACES),
    "siglip": (_LOWER, _PUNCTUATION, *_SPACES),
    "lower": (_LOWER,),
    "none": (),
}
"""What is done to captions (clipkit/models/tokenizer.py), for programs that only have the tokenizer.json."""


def write_tokenizer(tokenizer: AnyTokenizer, conventions: Conventions, folder: Path) -> list[Path]:
    """tokenizer.json with the cleaning and the special tokens around a caption, and transformers' files beside it.

    `tokenizers` and transformers' AutoTokenizer then give the ids that `tokenizer` gives. Of its cleaning they lack
    ftfy's repairs across characters, and HTML's entities.
    """
    content = json.loads(tokenizer.to_json())
    content["truncation"] = content["padding"] = None
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in order
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    names = {i: token for token, i in vocabulary.items()}
    names |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    own = [content["normalizer"]] if content.get("normalizer") else []
    content["normalizer"] = {"type": "Sequence", "normalizers": [*_NORMALIZERS[conventions.text_cleaning], *own]}
    special = {"eos_token": names[tokenizer.end_id], "pad_token": names[conventions.pad_id]}
    settings: dict[str, Any] = {}
    if isinstance(tokenizer, Tokenizer):
        content["post_processor"] = _around({START: tokenizer.start_id}, {END: tokenizer.end_id})
        special |= {"bos_token": START}
        settings["split_special_tokens"] = True  # no caption can end itself
        if (
            conventions.text_attention == "causal"
        ):  # tokens after END are not seen, and CLIP's own tokenizer pads with END
            special["pad_token"] = END
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.context_length}
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": {**settings, **special, "padding_side": "right"},
        "special_tokens_map.json": special,
    }
    for name, written in files.items():
        write_atomically(folder / name, json.dumps(written, indent=2) + "\n")
    return [folder / name for name in files]


def _around(start: dict[str, int], end: dict[str, int]) -> dict[str, Any]:
    first, last = ([{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens] for tokens in (start, end))
    pieces = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (start | end).items()},
    }
