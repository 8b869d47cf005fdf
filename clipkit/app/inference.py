"""Inference on pictures that are sent, with limits on how many are decoded at a time."""

from __future__ import annotations

import io
import threading

import torch
from PIL import Image
from torch import Tensor

from clipkit.app.limits import MAX_DECODING, MAX_PIXELS
from clipkit.data.images import decode
from clipkit.models.pretrained import Pretrained
from clipkit.zeroshot.similarity import Guess, classify, embed_images

_THUMBNAIL = 160


class Inference:
    """A CLIP for encoded pictures. MAX_DECODING of them are decoded at a time, and none is kept.

    A small file may have many pixels, and a PNG of MAX_PIXELS takes 300 MB while its transparency is removed.
    """

    def __init__(self, clip: Pretrained) -> None:
        self.clip = clip
        self._turns = threading.Semaphore(MAX_DECODING)

    def classify(self, picture: bytes, labels: list[str], template: str) -> list[Guess]:
        """The most probable labels of an encoded image. Raises SampleError, and UsageError as `classify` does."""
        with self._turns:
            return classify(self.clip, [self._decoded(picture)], labels, [template])[0]

    def embed(self, pictures: list[bytes]) -> Tensor:
        """Encoded images -> unit vectors [len(pictures), D]. Raises SampleError."""
        vectors = []
        for picture in pictures:
            with self._turns:
                vectors.append(embed_images(self.clip, [self._decoded(picture)]))
        return torch.cat(vectors)

    def _decoded(self, picture: bytes) -> Image.Image:
        # A JPEG reduced to four times the model's image size is as good as the full one.
        return decode(picture, reduce_to=4 * self.clip.model.config.image_size, max_pixels=MAX_PIXELS)

    def thumbnail(self, picture: bytes) -> bytes:
        """An encoded image -> a small PNG of it. Raises SampleError."""
        with self._turns:
            image = decode(picture, reduce_to=_THUMBNAIL)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
