"""`clipkit.load`: a trained CLIP with its tokenizer and preprocessing, ready to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipkit import checkpoint, distributed
from clipkit.checkpoint import Checkpoint
from clipkit.config import from_dict
from clipkit.errors import CheckpointError
from clipkit.images import preprocess
from clipkit.model import CLIP, CLIPConfig
from clipkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode; `preprocess(image)` gives uint8 [3, S, S], `tokenizer(texts)` gives ids [B, L]."""

    model: CLIP
    tokenizer: Tokenizer
    preprocess: Callable[[Image.Image], Tensor]


def find(path: str | Path, kind: str) -> Checkpoint:
    """The newest valid checkpoint of a run of this kind ("clip", "denoiser", "noisy_clip").

    `path` is the run's folder, or a folder that holds runs named after their kinds.
    Raises CheckpointError saying what was found instead.
    """
    folder = Path(path)
    for candidate in (folder, folder / kind):
        found = checkpoint.latest(candidate) if (candidate / "checkpoints").is_dir() else None
        if found is not None and found.state.get("kind") == kind:
            return found
        if found is not None:
            raise CheckpointError(f"{candidate} is a {found.state.get('kind')} run; a {kind} run is needed")
    what = "does not exist" if not folder.exists() else f"holds no {kind} checkpoint"
    raise CheckpointError(f"{folder} is not a model: it {what}; give the folder of a training run")


def load(path: str | Path, device: str = "auto") -> Pretrained:
    """Load the averaged weights of a CLIP run.

    Raises CheckpointError when `path` is not one, or its files are damaged.
    """
    found = find(path, "clip")
    config = from_dict(CLIPConfig, found.state["recipe"]["model"])
    tokenizer = Tokenizer.from_json(found.text("tokenizer.json"), config.context_length)
    model = CLIP(config, tokenizer.vocab_size, tokenizer.end_id)
    load_weights(model, found)
    model.to(distributed.choose_device(device)).eval()
    return Pretrained(model, tokenizer, partial(preprocess, size=config.image_size))


def load_weights(model: torch.nn.Module, found: Checkpoint) -> None:
    """Fill `model` with the averaged weights. Raises CheckpointError when they do not fit it."""
    try:
        model.load_state_dict(found.tensors("ema"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{found.path} does not fit its own recipe: {str(error).splitlines()[0][:120]}") from None
