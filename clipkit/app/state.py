"""State of the page: the models and the embedding index that its routes use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from clipkit.data import drawings
from clipkit.data.files import counted
from clipkit.errors import CheckpointError, DataError
from clipkit.guidance.pipeline import Pipeline
from clipkit.log import say
from clipkit.models.pretrained import Pretrained, fingerprint, load
from clipkit.zeroshot.galleries import Gallery, open_gallery
from clipkit.zeroshot.heads import CACHE
from clipkit.zeroshot.index import Index, build


@dataclass(frozen=True)
class AppState:
    """A CLIP, a gallery with its embedding index, and a pipeline, or the reason why this model cannot draw."""

    model: str
    clip: Pretrained
    source: str
    """Source of the gallery's pictures, for display."""
    gallery: Gallery
    index: Index
    pipeline: Pipeline | str

    @classmethod
    def open(cls, model: str, images: str | None = None, device: str = "auto") -> AppState:
        """Load `model`, and embed the folder or pack `images` (default: drawings) unless its index is in the cache.

        Raises CheckpointError and DataError as `load` and `open_gallery` do, also when no picture can be read.
        """
        gallery = open_gallery(images or str(_drawings()))
        try:
            pipeline: Pipeline | str = Pipeline.open(model, device)
        except CheckpointError as error:
            pipeline = f"this model cannot draw: {error}"
        clip = load(model, device) if isinstance(pipeline, str) else pipeline.clip
        mark = hashlib.sha256(f"{gallery.source} {gallery.identity()} {fingerprint(clip.model)}".encode()).hexdigest()
        folder = CACHE / "indexes" / mark[:16]
        build(clip, model, gallery, folder)
        index = Index(folder)
        if skipped := index.skipped:
            reasons = counted(dict(skipped.most_common()))
            if not len(index):
                raise DataError(f"none of the {len(gallery)} pictures of {gallery.source} can be read ({reasons})")
            say(f"{skipped.total()} of {len(gallery)} pictures of {gallery.source} are skipped ({reasons})")
        if isinstance(pipeline, str):
            say(pipeline)
        return cls(model, clip, images or "clipkit's own drawings", gallery, index, pipeline)


def _drawings() -> Path:
    """A folder with a drawing of each object in each colour, written on first use."""
    folder = CACHE / "drawings"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("val", "heldout"):
        for i, (object_, colour) in enumerate(drawings.SPLITS[split]):
            file = folder / f"{colour} {object_}.png"
            if not file.is_file():
                drawings.draw(split, 0, i, size=96).image.save(file)
    return folder
