"""Distillation: a CLIP regresses the features of teacher CLIPs for the same images and captions.

Feature mimicry, the best of the losses that CLIP-KD compares (Yang et al. 2024, arXiv 2307.12732, section 3.2); teacher
and student see the same views (Beyer et al. 2022, arXiv 2106.05237, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.config import require
from clipkit.data.loader import Batch
from clipkit.errors import CheckpointError
from clipkit.models.clip import CLIP
from clipkit.models.pretrained import load
from clipkit.models.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class DistilConfig:
    """Distillation: teachers, and the weight of the distance to their features."""

    teachers: tuple[str, ...] = ()
    """Teacher CLIPs, each a name or folder that `clipkit.load` takes. Of several the mean feature is learned, so that
    they must share one embedding: fine-tuned from one another, or trained against one locked tower. With data.flip they
    see each image mirrored as well."""
    weight: float = 10.0
    """Weight of the squared distance to the teachers' features, beside the contrastive loss."""

    def __post_init__(self) -> None:
        require("above 0", "distil", self, "weight")


class Teachers:
    """The teacher CLIPs of a recipe: frozen, not saved, and not a submodule of the task."""

    def __init__(self, config: DistilConfig, embed_dim: int) -> None:
        """Raises CheckpointError for a teacher that is none, or whose features are of another width."""
        self.clips = [load(name, "cpu") for name in config.teachers]
        for name, clip in zip(config.teachers, self.clips, strict=True):
            if (found := clip.model.config.embed_dim) != embed_dim:
                raise CheckpointError(
                    f"{name} has features of {found} dimensions, this model of {embed_dim}; a student needs its "
                    f"teachers' width: model.embed_dim={found}"
                )

    @property
    def tokenizers(self) -> list[AnyTokenizer]:
        """Each teacher's tokenizer."""
        return [clip.tokenizer for clip in self.clips]

    @torch.no_grad()
    def __call__(self, student: CLIP, batch: Batch, mirrored: bool) -> tuple[Tensor | None, Tensor | None]:
        """The teachers' mean features of images and captions, [b, D] each, normalised.

        With `mirrored`, the mean is also over the mirrored images. None for a frozen tower of the student.
        """
        image, text = (any(p.requires_grad for p in tower.parameters()) for tower in (student.image, student.text))
        views = [batch.images, batch.images.flip(-1)] if mirrored else [batch.images]
        return self._of_images(views) if image else None, self._of_texts(batch) if text else None

    def _of_images(self, views: Sequence[Tensor]) -> Tensor:
        models = [clip.model.to(views[0].device) for clip in self.clips]
        return _direction(model.encode_image(_resized(view, model)) for model in models for view in views)

    def _of_texts(self, batch: Batch) -> Tensor:
        models = [clip.model.to(batch.images.device) for clip in self.clips]
        ids = [batch.ids(clip.tokenizer) for clip in self.clips]
        return _direction(model.encode_text(row) for model, row in zip(models, ids, strict=True))


def _direction(features: Iterable[Tensor]) -> Tensor:
    return F.normalize(torch.stack(list(features)).sum(dim=0), dim=-1)


def _resized(images: Tensor, model: CLIP) -> Tensor:
    """uint8 [b, 3, S, S] at the side that the model was made for."""
    size = model.config.image_size
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def squared_distance(made: Tensor, wanted: Tensor) -> Tensor:
    """Of rows [b, D], summed over D: a scalar whose mean over ranks is the mean over the rows of all of them."""
    return distributed.mean_over_batch((made.float() - wanted.float()).square())
