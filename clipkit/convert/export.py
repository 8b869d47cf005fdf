"""Export: our models as folders of open_clip and transformers, ONNX graphs and torch.export programs.

The first two are read back by their libraries (and by clipkit.load) with equal features. The graphs take the inputs of
our models: uint8 pixels, and token ids that end with END.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit import inputs
from clipkit._version import __version__
from clipkit.convert.open_clip import to_open_clip
from clipkit.convert.tokenizer_files import write_tokenizer
from clipkit.convert.transformers import to_transformers
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import write_atomically, written_whole
from clipkit.models.pretrained import Pretrained
from clipkit.registry import EXPORT_FORMATS


def export(clip: Pretrained, out: Path, form: str, name: str = "") -> list[Path]:
    """Write the model into the folder `out` in the format `form` -> the files written.

    `out` is new or empty, or holds an earlier export in this format, which is replaced. `name` is the name under which
    it will be published; by default the folder's.
    Raises UsageError naming the part of the architecture that the other library does not have, and for an `out` that
    holds other files or cannot be written.
    """
    check_place(out, form)
    with written_whole(out) as aside:
        files = EXPORT_FORMATS[form](clip, aside, name or out.name)
    return [out / file.name for file in files]


def check_place(out: Path, form: str) -> None:
    """Check that `export` can write there, before the work. Raises UsageError."""
    EXPORT_FORMATS.entry(form)
    (inputs.check_writable if _holds_export(out, form) else inputs.check_new)(out)


_WEIGHTS = {"open_clip": "open_clip_model.safetensors", "transformers": "model.safetensors"}
_FILES = {
    "open_clip": ("open_clip_config.json",),
    "transformers": ("config.json", "preprocessor_config.json"),
    "onnx": ("image.onnx", "text.onnx", "clipkit.json"),
    "torch": ("image.pt2", "text.pt2", "clipkit.json"),
}
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")


def _holds_export(out: Path, form: str) -> bool:
    """Whether a folder holds an export by clipkit in this format, and no other files."""
    from safetensors import SafetensorError, safe_open

    weights = _WEIGHTS.get(form, "clipkit.json")
    if not os.path.isfile(out / weights) or {p.name for p in out.iterdir()} - {
        weights,
        *_FILES.get(form, ()),
        *_BESIDE,
    }:
        return False
    try:
        if form in _WEIGHTS:
            with safe_open(out / weights, framework="pt") as file:
                return "clipkit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
    return True


def _save(path: Path, tensors: Mapping[str, Tensor], clip: Pretrained) -> Path:
    from safetensors.torch import save

    about = {"format": "pt", "clipkit": __version__, "activation": clip.model.config.conventions.text_activation}
    write_atomically(path, save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata=about))
    return path


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def write_open_clip(clip: Pretrained, out: Path, name: str) -> list[Path]:
    """open_clip's folder. Raises UsageError for architectures that open_clip does not have."""
    try:
        config, tensors = to_open_clip(clip.model, clip.tokenizer, name)
    except (UsageError, CheckpointError) as error:
        raise _not_there(error) from None
    return [
        _write_json(out / "open_clip_config.json", config),
        _save(out / _WEIGHTS["open_clip"], tensors, clip),
        *write_tokenizer(clip.tokenizer, clip.model.config.conventions, out),
    ]


def write_transformers(clip: Pretrained, out: Path, name: str) -> list[Path]:
    """transformers' folder. Raises UsageError for architectures that transformers does not have."""
    try:
        config, preprocessor, tensors = to_transformers(clip.model, clip.tokenizer)
    except (UsageError, CheckpointError) as error:
        raise _not_there(error) from None
    return [
        _write_json(out / "config.json", config),
        _write_json(out / "preprocessor_config.json", preprocessor),
        _save(out / _WEIGHTS["transformers"], tensors, clip),
        *write_tokenizer(clip.tokenizer, clip.model.config.conventions, out),
    ]


def _not_there(error: Exception) -> UsageError:
    return UsageError(f"{error}; the formats onnx and torch take every model")
