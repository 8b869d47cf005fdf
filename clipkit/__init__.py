"""clipkit: train CLIP, use it zero-shot, and let it draw.

Importing this package costs nothing: torch and timm are imported when a name that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit._version import __version__

if TYPE_CHECKING:
    from clipkit.errors import ClipkitError
    from clipkit.model import CLIP, CLIPConfig
    from clipkit.pretrained import Pretrained, load
    from clipkit.shards import Shards
    from clipkit.tokenizer import Tokenizer

# In a source checkout train/, zeroshot/ and guidance/ lie beside clipkit/, not in it. Without this, a plain install run
# from the repository's root finds this folder first and no clipkit.train in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.insert(0, str(_checkout))

DEFAULT_MODEL = "clipkit-tiny"
"""The model that comes with the package: a CLIP, a denoiser and a noise-aware CLIP, trained by the shipped recipes."""

_HOMES = {
    "CLIP": "clipkit.model",
    "CLIPConfig": "clipkit.model",
    "ClipkitError": "clipkit.errors",
    "Pretrained": "clipkit.pretrained",
    "Shards": "clipkit.shards",
    "Tokenizer": "clipkit.tokenizer",
    "load": "clipkit.pretrained",
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
