"""Zero-shot classification: a class head from prompts, and the scores of a data set against it.

Radford et al. 2021 (arXiv 2103.00020), section 3.1: the weight of a class is the mean of its prompts' embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.images import preprocessing
from clipkit.model import CLIP
from clipkit.records import progress
from clipkit.tokenizer import AnyTokenizer
from clipkit.zeroshot.datasets import ImageSet

_TEXT_BATCH = 512
_PADDING = -1


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: AnyTokenizer, texts: Sequence[str]) -> Tensor:
    """Texts -> unit vectors [len(texts), D] on the model's device.

    Each distinct text is encoded once, and texts of like length share a batch.
    """
    distinct = sorted(set(texts), key=lambda t: (len(t), t))
    features = [
        model.encode_text(tokenizer(distinct[i : i + _TEXT_BATCH])) for i in range(0, len(distinct), _TEXT_BATCH)
    ]
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(features)[[place[t] for t in texts]]


def class_head(
    model: CLIP, tokenizer: AnyTokenizer, classnames: Sequence[str | Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """Head [C, D]: for each class the normalised mean of the normalised embeddings of its prompts.

    A class is a name or a list of names (synonyms count alike); a template has one `{}` for the name.
    Raises UsageError for no classes, no templates, an empty name or a template without `{}`.
    """
    names = [[c] if isinstance(c, str) else list(c) for c in classnames]
    if not names or not templates:
        raise UsageError(f"a class head needs classes and templates; got {len(names)} and {len(templates)}")
    if any(not group or not all(n.strip() for n in group) for group in names):
        raise UsageError("a class name is empty; every class needs at least one word")
    if bad := [t for t in templates if t.count("{}") != 1]:
        raise UsageError(f"template {bad[0]!r} must hold exactly one {{}} where the class name goes")
    prompts = [[t.format(n) for n in group for t in templates] for group in names]
    features = embed_texts(model, tokenizer, [p for group in prompts for p in group])
    return torch.stack([F.normalize(f.mean(dim=0), dim=0) for f in torch.split(features, [len(p) for p in prompts])])


@dataclass(frozen=True)
class Scores:
    """Fractions over a data set of `n` images; `mean_per_class` is the mean of each present class's recall."""

    n: int
    top1: float
    top5: float
    mean_per_class: float


class _Preprocessed(Dataset[tuple[Tensor, int]]):
    """This rank's share of an image set, as uint8 tensors and labels."""

    def __init__(self, images: ImageSet, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.preprocess = images, preprocess
        self.rank, self.ranks = distributed.rank(), distributed.world_size()

    def __len__(self) -> int:
        return -(-len(self.images) // self.ranks)  # the same on all ranks: a cut model needs them all

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        index = self.rank + i * self.ranks
        image, label = self.images[min(index, len(self.images) - 1)]
        return self.preprocess(image), label if index < len(self.images) else _PADDING


@torch.no_grad()
def evaluate(model: CLIP, head: Tensor, images: ImageSet, batch_size: int = 256, workers: int = 0) -> Scores:
    """Classify every image by its nearest row of `head` [C, D]; all ranks share the work and get the same scores.

    A class that no image has is left out of the per-class mean; top-5 is top-C when there are fewer classes.
    Raises UsageError for an empty set.
    """
    if not len(images):
        raise UsageError(f"data set {images.name!r} holds no image")
    device, classes = head.device, len(head)
    counts = torch.zeros(3, classes, dtype=torch.int64, device=device)  # images, right at 1, right among 5
    loader = DataLoader(_Preprocessed(images, preprocessing(model.config)), batch_size=batch_size, num_workers=workers)
    for pixels, labels in progress(loader, len(loader), "zero-shot"):
        ranking = (model.encode_image(pixels.to(device)) @ head.T).topk(min(5, classes), dim=1).indices
        ranking, labels = ranking[labels != _PADDING], labels[labels != _PADDING].to(device)
        hits = ranking == labels[:, None]  # [b, 5]
        counts += torch.stack(
            [_per_class(labels, torch.ones_like(labels), classes)]
            + [_per_class(labels, hits[:, :k].any(dim=1).long(), classes) for k in (1, 5)]
        )
    total, right1, right5 = distributed.sum_over_ranks(counts).double().cpu()
    present = total > 0
    n = int(total.sum())
    recall = (right1[present] / total[present]).mean()
    return Scores(n, float(right1.sum() / n), float(right5.sum() / n), float(recall))


def _per_class(labels: Tensor, values: Tensor, classes: int) -> Tensor:
    return torch.zeros(classes, dtype=torch.int64, device=labels.device).index_add_(0, labels, values)
