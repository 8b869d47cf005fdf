"""Published weights: which library's layout they have, and our configuration and state dict of them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from clipkit.convert.open_clip import from_open_clip
from clipkit.convert.openai import from_openai, is_openai
from clipkit.convert.processors import read_preprocessor
from clipkit.convert.renaming import Tensors
from clipkit.convert.tokenizer_files import TokenizerFiles
from clipkit.convert.transformers import from_transformers
from clipkit.convert.unpickling import Archive
from clipkit.errors import CheckpointError
from clipkit.io import read_object
from clipkit.models.clip import CLIPConfig

OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
"""Names of the configuration files."""


def is_transformers(tensors: Tensors) -> bool:
    """Whether these are named as transformers names them."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in tensors)


def to_ours(folder: Path, archive: Archive, files: TokenizerFiles) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Our configuration and state dict of weights that lie in `folder`.

    Raises CheckpointError when neither a configuration nor the weights themselves tell the architecture.
    """
    tensors = archive.tensors
    # Folders often have both configurations; the tensors say which of them they go with.
    transformers = (folder / TRANSFORMERS).is_file() and is_transformers(tensors)
    if (folder / OPEN_CLIP).is_file() and not transformers:
        return from_open_clip(read_object(folder / OPEN_CLIP), tensors, files)
    if (folder / TRANSFORMERS).is_file():
        return from_transformers(read_object(folder / TRANSFORMERS), read_preprocessor(folder), tensors, files)
    if archive.scripted or is_openai(tensors):
        return from_openai(tensors)
    raise CheckpointError(
        "these weights do not say what model they belong to, nor whether its GELU is the quick one; put an "
        "open_clip_config.json beside them"
    )
