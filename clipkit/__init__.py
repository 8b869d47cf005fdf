"""clipkit: train CLIP, use it zero-shot, and draw with it.

The public API is what this package, `clipkit.train`, `clipkit.zeroshot` and `clipkit.guidance` list in `__all__`.
Importing them is light: torch and timm are imported when a name that needs them is first used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from clipkit._lazy import lazy
from clipkit._renamed import Finder
from clipkit._version import __version__

if TYPE_CHECKING:
    from clipkit.config import load_recipe
    from clipkit.data.shards import Shards
    from clipkit.errors import (
        CheckpointError,
        ClipkitError,
        DataError,
        NonFiniteError,
        RankError,
        RecipeError,
        SampleError,
        ShardError,
        StoppedError,
        UsageError,
    )
    from clipkit.models.clip import CLIP, CLIPConfig
    from clipkit.models.pretrained import Pretrained, load
    from clipkit.models.tokenizer import Tokenizer

sys.meta_path.append(Finder())

DEFAULT_MODEL = "clipkit-tiny"
"""The model that comes with the package: a CLIP, a denoiser and a noise-aware CLIP, trained by the shipped recipes."""

__all__ = [
    "CLIP",
    "DEFAULT_MODEL",
    "CLIPConfig",
    "CheckpointError",
    "ClipkitError",
    "DataError",
    "NonFiniteError",
    "Pretrained",
    "RankError",
    "RecipeError",
    "SampleError",
    "ShardError",
    "Shards",
    "StoppedError",
    "Tokenizer",
    "UsageError",
    "__version__",
    "load",
    "load_recipe",
]
_HOMES = {
    "clipkit.config": ["load_recipe"],
    "clipkit.data.shards": ["Shards"],
    "clipkit.errors": [name for name in __all__ if name.endswith("Error")],
    "clipkit.models.clip": ["CLIP", "CLIPConfig"],
    "clipkit.models.pretrained": ["Pretrained", "load"],
    "clipkit.models.tokenizer": ["Tokenizer"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
