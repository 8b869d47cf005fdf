"""Zero-shot use of CLIP: class heads from prompts, data sets, classification, retrieval, linear probes and search."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "clipkit.zeroshot":
    raise ImportError("import clipkit.zeroshot, not zeroshot: a module has one name")

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.zeroshot import classify, probe, retrieval
    from clipkit.zeroshot.classify import Scores, evaluate, predict
    from clipkit.zeroshot.datasets import ImageSet, from_shards, open_set
    from clipkit.zeroshot.heads import class_head
    from clipkit.zeroshot.index import Index

__all__ = [
    "ImageSet",
    "Index",
    "Scores",
    "class_head",
    "classify",
    "evaluate",
    "from_shards",
    "open_set",
    "predict",
    "probe",
    "retrieval",
]
_HOMES = {
    "clipkit.zeroshot": ["classify", "probe", "retrieval"],
    "clipkit.zeroshot.classify": ["Scores", "evaluate", "predict"],
    "clipkit.zeroshot.datasets": ["ImageSet", "from_shards", "open_set"],
    "clipkit.zeroshot.heads": ["class_head"],
    "clipkit.zeroshot.index": ["Index"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
