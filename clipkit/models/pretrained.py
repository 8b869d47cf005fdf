"""`clipkit.load`: a trained CLIP with its tokenizer and preprocessing, ready to use; and identities of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipkit import DEFAULT_MODEL, distributed
from clipkit.checkpoint import Checkpoint, half
from clipkit.data.images import preprocessing
from clipkit.errors import CheckpointError
from clipkit.models.clip import CLIP
from clipkit.models.source import open_source
from clipkit.models.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode; `preprocess(image)` gives uint8 [3, S, S], `tokenizer(texts)` gives ids [B, L]."""

    model: CLIP
    tokenizer: AnyTokenizer
    preprocess: Callable[[Image.Image], Tensor]
    words: Sequence[str] = field(default=(), repr=False)
    """All words of the captions that it was trained on; empty where they are not recorded, as for published weights."""


def load(name: str | Path = DEFAULT_MODEL, device: str = "auto") -> Pretrained:
    """A CLIP with its tokenizer and preprocessing: one of ours, or one that others trained.

    `name` is "clipkit-tiny", which comes with the package; the folder of one of our runs (its averaged weights are
    taken); a folder with an open_clip_config.json, or with the config.json of transformers' CLIP or SigLIP; a file of
    OpenAI's, state dict or TorchScript archive; "architecture/pretraining" in open_clip's words, or
    "hf-hub:organisation/name", which are fetched from the hub.
    Nothing in these files is run. Raises CheckpointError when `name` is none of this, its files are damaged, or its
    architecture is one that clipkit does not have.
    """
    source = open_source(name)
    model = source.build().to(distributed.choose_device(device))
    return Pretrained(model, source.tokenizer, preprocessing(model.config), source.words)


def load_weights(model: torch.nn.Module, found: Checkpoint) -> None:
    """Fill `model` with the averaged weights. Raises CheckpointError when they do not fit it."""
    try:
        model.load_state_dict(found.tensors("ema"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{found.path} does not fit its own recipe: {str(error).splitlines()[0][:120]}") from None


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of a model's weights."""
    return _hash(model.state_dict())


TRAINED_WITH = "trained_with.json"
"""File of a checkpoint: the recipe's key of each model that the training used, with its `identity`."""


def identity(model: torch.nn.Module) -> str:
    """Hash of a model's weights that is the same before and after `release`, which halves the precision of some."""
    return _hash({name: half(tensor) for name, tensor in model.state_dict().items()})


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
