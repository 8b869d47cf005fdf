"""clipkit: train CLIP, use it zero-shot, and let it draw.

Importing this package costs nothing: torch and timm are imported when a name that needs them is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipkit._renamed import Finder
from clipkit._version import __version__

if TYPE_CHECKING:
    from clipkit.data.shards import Shards
    from clipkit.errors import ClipkitError
    from clipkit.models.clip import CLIP, CLIPConfig
    from clipkit.models.pretrained import Pretrained, load
    from clipkit.models.tokenizer import Tokenizer

sys.meta_path.append(Finder())

DEFAULT_MODEL = "clipkit-tiny"
"""The model that comes with the package: a CLIP, a denoiser and a noise-aware CLIP, trained by the shipped recipes."""

_HOMES = {
    "CLIP": "clipkit.models.clip",
    "CLIPConfig": "clipkit.models.clip",
    "ClipkitError": "clipkit.errors",
    "Pretrained": "clipkit.models.pretrained",
    "Shards": "clipkit.data.shards",
    "Tokenizer": "clipkit.models.tokenizer",
    "load": "clipkit.models.pretrained",
}

__all__ = [
    "CLIP",
    "DEFAULT_MODEL",
    "CLIPConfig",
    "ClipkitError",
    "Pretrained",
    "Shards",
    "Tokenizer",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
