"""Cosine similarity and zero-shot classification of a few pictures, as numbers and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from clipkit.data.images import decode
from clipkit.errors import DataError, UsageError
from clipkit.models.pretrained import Pretrained
from clipkit.models.words import unknown
from clipkit.zeroshot.embedding import Encoder, embed
from clipkit.zeroshot.heads import class_head, embed_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP = 5
MOST_SHOWN = 100
"""Pictures, or texts, in a figure."""


@dataclass(frozen=True)
class Guess:
    """A label and its probability among all labels, under the model's learned logit scale."""

    label: str
    probability: float


def read_images(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Files -> RGB images. Raises DataError naming the first that cannot be read or is no JPEG, PNG or WebP."""
    found = []
    for path in paths:
        try:
            found.append(decode(Path(path).read_bytes()))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return found


def embed_images(clip: Pretrained, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """Images -> unit vectors [len(images), D] on the model's device."""
    found = embed(Encoder.of(clip.model), lambda i: (images[i], None), range(len(images)), batch_size, shared=False)
    return found.features.to(clip.model.logit_scale.device)


def similarities(clip: Pretrained, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """Cosines [len(texts), len(images)] of every text with every image. Raises UsageError for an empty text or none."""
    if not images:
        raise UsageError("similarity needs at least one image and one text, none of them empty")
    return cosines(clip, embed_images(clip, images), texts)


def cosines(clip: Pretrained, vectors: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosines [len(texts), N] of every text with image embeddings [N, D]. Raises UsageError as `similarities` does."""
    if not texts or not all(t.strip() for t in texts):
        raise UsageError("similarity needs at least one image and one text, none of them empty")
    described = embed_texts(clip.model, clip.tokenizer, texts)
    return (described @ vectors.to(described).T).float().cpu()


def classify(
    clip: Pretrained,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> list[list[Guess]]:
    """The five most probable labels of each image, best first. Raises UsageError for labels that make no head."""
    head = class_head(clip.model, clip.tokenizer, labels, templates)
    return guesses(clip, embed_images(clip, images), labels, head)


@torch.no_grad()
def guesses(clip: Pretrained, vectors: Tensor, labels: Sequence[str], head: Tensor) -> list[list[Guess]]:
    """The five most probable labels of image embeddings [N, D] under a class head [len(labels), D], best first."""
    probabilities = (clip.model.logit_scale * vectors.to(head) @ head.T).softmax(dim=1).cpu()
    best = probabilities.topk(min(_TOP, len(labels)), dim=1)
    return [
        [Guess(labels[i], p) for i, p in zip(places, values, strict=True)]
        for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def unknown_words(clip: Pretrained, texts: Sequence[str]) -> list[str]:
    """Words of `texts` that are in no caption of the training set; none if the words of its captions are unknown.

    Numbers are omitted: the tokenizer splits them into digits.
    """
    found = unknown([text.replace("_", " ") for text in texts], clip.words)
    return [word for word in found if not any(character.isdigit() for character in word)]


def _pyplot() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError('figures are drawn with matplotlib: pip install "clipkit[plot]"') from None
    return Figure


def check_figure(out: Path) -> None:
    """Check that figures can be drawn and written to this file. Raises UsageError."""
    from clipkit.inputs import check_file

    kinds = _pyplot()().canvas.get_supported_filetypes()
    check_file(out, [f".{kind}" for kind in sorted(kinds, key=lambda kind: (kind not in ("png", "svg", "pdf"), kind))])


def similarity_figure(images: Sequence[Image.Image], texts: Sequence[str], cosines: Tensor) -> Figure:
    """The matrix with its numbers, the images along the top (Radford et al. 2021, the notebook of their repository)."""
    rows, columns = cosines.shape
    cell = 0.5  # as high as wide is a picture, half as high a number
    figure = _pyplot()(figsize=(3 + 1.1 * columns, 0.4 + 1.1 * (1 + cell * rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cosines.numpy(), extent=(-0.5, columns - 0.5, cell * rows, 0), cmap="viridis")
    for i, image in enumerate(images):
        axes.imshow(_square(image), extent=(i - 0.48, i + 0.48, -0.02, -0.98))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(cell * rows, -1), aspect="equal", xticks=[])
    axes.set_yticks([cell * (row + 0.5) for row in range(rows)], [t if len(t) < 48 else t[:45] + "..." for t in texts])
    axes.spines[:].set_visible(False)
    middle = float(cosines.min() + cosines.max()) / 2
    for row in range(rows):
        for column in range(columns):
            value = float(cosines[row, column])
            colour = "black" if value > middle else "white"
            axes.text(column, cell * (row + 0.5), f"{value:.2f}", ha="center", va="center", color=colour)
    return figure


def classify_figure(images: Sequence[Image.Image], guesses: Sequence[Sequence[Guess]]) -> Figure:
    """Each image beside a bar chart of its most probable labels."""
    figure = _pyplot()(figsize=(7, 2.4 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 1.6])
    for (left, right), image, found in zip(axes, images, guesses, strict=True):
        left.imshow(image)
        left.axis("off")
        _bars(right, found)
    return figure


def _bars(axes: Axes, guesses: Sequence[Guess]) -> None:
    axes.barh([g.label for g in guesses], [g.probability for g in guesses])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="probability")


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((128, 128))
