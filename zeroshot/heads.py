"""Class heads: the weights of a zero-shot classifier, a prompt ensemble for each class through the text encoder.

Radford et al. 2021 (arXiv 2103.00020), section 3.1.4.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.data.classes import checked_templates, fill
from clipkit.errors import UsageError
from clipkit.io import write_atomically
from clipkit.log import progress, say
from clipkit.models.clip import CLIP
from clipkit.models.tokenizer import AnyTokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipkit"
"""Cache of class heads, features and indexes."""
_TEXT_BATCH = 256


@cache
def ensembles() -> dict[str, list[str]]:
    """Template sets of the CLIP repository's notebook for ImageNet, by name: "one", "7" (the best subset) and "80"."""
    text = files("clipkit.zeroshot").joinpath("data/templates.json").read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)["ensembles"]
    return found


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: AnyTokenizer, texts: Sequence[str], shared: bool = False) -> Tensor:
    """Texts -> unit vectors [len(texts), D] on the model's device.

    Each distinct text is encoded once, and texts of similar length share a batch. With `shared` the ranks, which must
    all ask for the same texts, share the batches.
    """
    distinct = sorted(set(texts), key=lambda t: (len(t), t))
    batches = [distinct[i : i + _TEXT_BATCH] for i in range(0, len(distinct), _TEXT_BATCH)]
    ranks = distributed.world_size() if shared else 1
    # Every n-th batch on n ranks; who has one fewer repeats the last, since an FSDP model needs all ranks each time.
    parts = [[batches[min(i + r, len(batches) - 1)] for i in range(0, len(batches), ranks)] for r in range(ranks)]
    own = parts[distributed.rank()] if shared else parts[0]
    bar = progress(own, len(own), "prompts") if len(own) > 4 else own
    features = torch.cat([model.encode_text(tokenizer(batch)) for batch in bar])
    if ranks > 1:
        features = distributed.gather_rows(features, distributed.batch_sizes(len(features)))
    place = {text: i for i, text in enumerate(text for part in parts for batch in part for text in batch)}
    return features[[place[t] for t in texts]]


def class_head(
    model: CLIP,
    tokenizer: AnyTokenizer,
    classnames: Sequence[str | Sequence[str]],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
    cache: Path | None = None,
) -> Tensor:
    """Class head [C, D]: for each class the normalised mean of the normalised embeddings of its prompts.

    A class is a name or a list of names (synonyms have equal weight); a template has one `{}` (or `{c}`) for the name.
    `descriptions` are further prompts, whole sentences, of classes by their first name. With `cache` (a folder) a
    head is computed once for the same text encoder, tokenizer and prompts.
    Raises UsageError for no classes, no templates, an empty name or a template without `{}`.
    """
    prompts = _prompts(classnames, templates, descriptions or {})

    def compute() -> Tensor:
        features = embed_texts(model, tokenizer, [p for group in prompts for p in group])
        means = [f.mean(dim=0) for f in torch.split(features, [len(group) for group in prompts])]
        return F.normalize(torch.stack(means), dim=1)

    if cache is None:
        return compute()
    file = cache / f"{_key(model, tokenizer, prompts)}.safetensors"
    return remembered(file, compute).to(model.log_logit_scale.device)


def _prompts(
    classnames: Sequence[str | Sequence[str]], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    groups = [[c] if isinstance(c, str) else list(c) for c in classnames]
    if not groups or not templates:
        raise UsageError(f"a class head needs classes and templates; got {len(groups)} and {len(templates)}")
    if any(not group or not all(n.strip() for n in group) for group in groups):
        raise UsageError("a class name is empty; every class needs at least one word")
    templates = checked_templates(templates)
    if strangers := [name for name in descriptions if name not in {group[0] for group in groups}]:
        raise UsageError(f"there are descriptions of {strangers[0]!r}, not one of the {len(groups)} classes")
    return [[fill(t, n) for n in group for t in templates] + list(descriptions.get(group[0], ())) for group in groups]


def _key(model: CLIP, tokenizer: AnyTokenizer, prompts: list[list[str]]) -> str:
    """Hash of everything that the head depends on."""
    digest = hashlib.sha256(json.dumps([tokenizer.fingerprint, tokenizer.context_length, prompts]).encode())
    digest.update(repr(model.config.conventions).encode())
    for name, tensor in sorted(model.text.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def remembered(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in `file`; computed and written if the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    with contextlib.suppress(OSError, SafetensorError, KeyError):
        found: Tensor = load_file(file)["tensor"]
        return found
    computed = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"tensor": computed.cpu().contiguous()}))
    except OSError as error:  # without a cache all is only slower
        _say_unwritable(file.parent, error.strerror or str(error))
    return computed


@cache
def _say_unwritable(folder: Path, reason: str) -> None:
    """Once for each folder and reason."""
    if distributed.rank() == 0:
        say(f"clipkit: cannot write the cache {folder}: {reason}; nothing is cached")
