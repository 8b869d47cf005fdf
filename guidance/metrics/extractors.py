"""Feature extractors of the metrics: any CLIP's image encoder, or Inception-V3 with the FID's weights.

A metric depends on its extractor, so each has a name and the hash of its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipkit import distributed
from clipkit.convert import unpickling as archives
from clipkit.data.images import decode, preprocess
from clipkit.errors import CheckpointError, DataError, SampleError
from clipkit.io import sha256
from clipkit.log import progress, say
from clipkit.models.pretrained import Pretrained, fingerprint
from clipkit.models.towers import residual_blocks


@dataclass(frozen=True)
class Extractor:
    """`preprocess(image)` gives uint8 [3, S, S]; `features` and `layers` take batches of them."""

    name: str
    weights: str
    preprocess: Callable[[Image.Image], Tensor]
    features: Callable[[Tensor], Tensor]
    """uint8 [B, 3, S, S] -> [B, D]."""
    layers: Callable[[Tensor], list[Tensor]] | None = None
    """uint8 [B, 3, S, S] -> activations [B, C, H, W] of several layers, or None."""
    logits: Callable[[Tensor], Tensor] | None = None
    """Features [B, D] -> class logits [B, K], or None."""
    text: Callable[[str], Tensor] | None = None
    """A text -> its features [D], or None."""


def clip_extractor(clip: Pretrained, name: str) -> Extractor:
    """A CLIP's unit vectors; its layers are the outputs of the image tower's blocks."""
    device = clip.model.log_logit_scale.device

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        return clip.model.encode_image(pixels.to(device)).float().cpu()

    @torch.no_grad()
    def layers(pixels: Tensor) -> list[Tensor]:
        return [tensor.float().cpu() for tensor in activations(clip.model.image, pixels.to(device))]

    @torch.no_grad()
    def text(prompt: str) -> Tensor:
        return clip.model.encode_text(clip.tokenizer(prompt))[0].float().cpu()

    return Extractor(f"CLIP {name}", fingerprint(clip.model), clip.preprocess, features, layers, text=text)


def activations(tower: Any, pixels: Tensor) -> list[Tensor]:
    """Outputs of the blocks of a CLIP's image tower, [B, C, H, W] each; a ViT's tokens become [B, C, N, 1]."""
    found: list[Tensor] = []
    hooks = []
    for block, channels in residual_blocks(tower.trunk):

        def keep(module: nn.Module, inputs: Any, output: Tensor, channels: int = channels) -> None:
            if output.ndim == 3:
                output = output.transpose(1, 2)[..., None]
            elif output.shape[1] != channels:
                output = output.permute(0, 3, 1, 2)
            found.append(output)

        hooks.append(block.register_forward_hook(keep))
    try:
        tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def inception_extractor(file: Path, device: str = "auto") -> Extractor:
    """Inception-V3 as the FID uses it, 2048 dimensions and 1008 classes, with the weights in `file`.

    Either of the published conversions of TensorFlow's inception-2015-12-05 will do (pytorch-fid's, torch-fidelity's).
    Pictures are resized to 299 with an antialiased bicubic, as clean-fid does (Parmar et al. 2022, arXiv 2104.11222):
    numbers made with TensorFlow's resize differ. Raises CheckpointError for weights of something else.
    """
    if not file.is_file():
        raise CheckpointError(f"no file at {file}; the FID's weights are pt_inception-2015-12-05-6726825d.pth")
    where = distributed.choose_device(device)
    model = _fid_inception()
    try:
        model.load_state_dict(archives.read(file).tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:120]
        raise CheckpointError(f"{file} does not hold the FID's Inception-V3: {first}") from None
    model.to(where).eval().requires_grad_(False)
    head: nn.Module = model.fc
    model.fc = nn.Identity()

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        out: Tensor = model((pixels.to(where).float() - 128) / 128)
        return out.float().cpu()

    @torch.no_grad()
    def logits(found: Tensor) -> Tensor:
        out: Tensor = F.linear(found.to(where), head.weight)  # type: ignore[arg-type]
        return out.cpu()  # without the bias, as the original score has it

    seen = partial(preprocess, size=299, resize="squash", interpolation="bicubic")
    return Extractor("Inception-V3 (FID)", sha256(file)[:16], seen, features, logits=logits)


def _fid_inception() -> Any:
    """torchvision's Inception-V3 with the original's pooling: borders do not count, the last block takes maxima."""
    from torchvision.models import inception_v3

    model: Any = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    model.transform_input = False
    mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    for name, block in model.named_children():
        if name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
            _pool_by(block, mean)
    _pool_by(model.Mixed_7c, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))
    return model


def _pool_by(block: Any, pool: Callable[[Tensor], Tensor]) -> None:
    plain = block._forward
    block._forward = lambda x: [*plain(x)[:-1], block.branch_pool(pool(x))]


class Extracted(NamedTuple):
    """Names and features [N, D] of pictures, and how many were skipped, by reason."""

    names: list[str]
    features: Tensor
    skipped: Mapping[str, int]


class Skipped:
    """Counts unreadable pictures by reason, for a message of one line."""

    def __init__(self, source: str) -> None:
        self.source, self.reasons = source, Counter[str]()
        self.first: dict[str, str] = {}

    def add(self, name: str, error: SampleError) -> None:
        """Count one."""
        self.reasons[error.reason] += 1
        self.first.setdefault(error.reason, name)

    def __str__(self) -> str:
        return ", ".join(f"{n} {reason} ({self.first[reason]})" for reason, n in self.reasons.most_common())

    def say(self, total: int) -> None:
        """One line on stderr, if there were some among `total` pictures."""
        if self.reasons:
            say(f"{self.source}: {self.reasons.total()} of {total} pictures skipped: {self}")


def extract(
    extractor: Extractor, pictures: Iterable[tuple[str, bytes]], batch_size: int = 64, source: str = "pictures"
) -> Extracted:
    """Features of encoded pictures; unreadable ones are skipped, counted and reported. `source` names them in messages.

    Raises DataError when no picture is left.
    """
    names: list[str] = []
    batch: list[Tensor] = []
    found: list[Tensor] = []
    skipped = Skipped(source)
    for name, data in progress(pictures, None, "pictures"):
        try:
            batch.append(extractor.preprocess(decode(data)))
            names.append(name)
        except SampleError as error:
            skipped.add(name, error)
        if len(batch) == batch_size:
            found.append(extractor.features(torch.stack(batch)))
            batch = []
    if batch:
        found.append(extractor.features(torch.stack(batch)))
    if not found:
        why = f"none of its pictures can be read: {skipped}" if skipped.reasons else "it has no pictures"
        raise DataError(f"nothing to measure in {source}: {why}")
    skipped.say(len(names) + skipped.reasons.total())
    return Extracted(names, torch.cat(found), skipped.reasons)
