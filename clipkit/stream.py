"""The stream of training batches: its order is a function of (seed, epoch, position), and of nothing else.

Several packs are mixed in fixed shares: which of them a position belongs to is a function of (seed, position) too, and
each keeps its own epochs.

Epoch e visits the samples in the permutation drawn from (seed, e); the epochs follow each other without a seam, and
batch k is positions k*B to (k+1)*B - 1 of that endless sequence. So every sample comes once per epoch, any step can be
started at without replaying the ones before it, and neither ranks, workers nor time can change what comes when.
"""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipkit.config import DataConfig
from clipkit.errors import DataError, SampleError
from clipkit.images import augment, decode, to_tensor
from clipkit.shards import Shards

_BLOCK = 1000


@dataclass
class Batch:
    """A rank's share of one step.

    images: uint8 [b, 3, S, S]. captions: b strings. groups: int64 [b]; samples of one group have interchangeable
    captions (the class of a classed pack, the hash of the caption elsewhere). skipped: bad samples by reason.
    """

    images: Tensor
    captions: list[str]
    groups: Tensor
    keys: list[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        images, groups = (t.to(device, non_blocking=True) for t in (self.images, self.groups))
        return dataclasses.replace(self, images=images, groups=groups)

    def pin_memory(self) -> Batch:
        """The same batch where a GPU can fetch it by itself; DataLoader calls this."""
        return dataclasses.replace(self, images=self.images.pin_memory(), groups=self.groups.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """`parts` batches of nearly equal size, in order, or as many as there are samples; `skipped` stays here."""
        parts = min(parts, len(self))
        edges = [len(self) * i // parts for i in range(parts + 1)]
        cuts = [slice(*edge) for edge in pairwise(edges)]
        return [Batch(self.images[c], self.captions[c], self.groups[c], self.keys[c]) for c in cuts]


class Mixture:
    """Position of the whole -> (pack, position in the pack's own endless sequence).

    Every _BLOCK positions hold each pack's share, exact to 1 / _BLOCK, in an order drawn from (seed, block).
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        exact = np.array(shares) / sum(shares) * _BLOCK
        self.quotas = np.floor(exact).astype(np.int64)
        largest_remainders = np.argsort(self.quotas - exact, kind="stable")
        self.quotas[largest_remainders[: _BLOCK - self.quotas.sum()]] += 1
        self.seed, self._block, self._order = seed, -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """Where the sample at this position comes from."""
        if len(self.quotas) == 1:
            return 0, position
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            packs = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._block, self._order = block, np.random.default_rng([self.seed, 2, block]).permutation(packs)
        pack = int(self._order[offset])
        return pack, block * int(self.quotas[pack]) + int((self._order[:offset] == pack).sum())


class _Samples(Dataset[Batch]):
    """Global positions -> decoded, augmented samples; each sample's randomness comes from (seed, position)."""

    def __init__(self, packs: Sequence[Shards], config: DataConfig, image_size: int, seed: int) -> None:
        self.packs, self.config, self.image_size, self.seed = packs, config, image_size, seed
        self.mixture = Mixture([1 - sum(config.mix.values()), *config.mix.values()], seed)
        self._orders: dict[int, tuple[int, np.ndarray[Any, Any]]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Which pack's sample, and which of them, stands at this position of the endless sequence."""
        pack, own = self.mixture(position)
        epoch, offset = divmod(own, len(self.packs[pack]))
        if self._orders.get(pack, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, *([pack] if pack else [])])
            self._orders[pack] = epoch, rng.permutation(len(self.packs[pack]))
        return pack, int(self._orders[pack][1][offset])

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch:
        with warnings.catch_warnings():  # Pillow warns of odd metadata; what matters, it raises
            warnings.simplefilter("ignore")
            return self._load(positions)

    def _load(self, positions: list[int]) -> Batch:
        images, captions, groups, keys, skipped = [], [], [], [], Counter[str]()
        for position in positions:
            rng = np.random.default_rng([self.seed, 1, position])
            try:
                pack, index = self.locate(position)
                sample = self.packs[pack].read(index)
                image = decode(sample.image)
            except SampleError as error:
                skipped[error.reason] += 1
                continue
            images.append(augment(image, self.image_size, self.config, rng))
            captions.append(sample.captions[rng.integers(len(sample.captions))])
            label = zlib.crc32(sample.captions[0].encode()) if sample.label is None else sample.label
            groups.append(label + (pack << 32))  # class 3 of one pack is not class 3 of another
            keys.append(sample.key)
        size = self.image_size
        stacked = to_tensor(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return Batch(stacked, captions, torch.tensor(groups, dtype=torch.int64), keys, skipped)


class _Steps(Sampler[list[int]]):
    """The positions of each step in turn, made when they are needed."""

    def __init__(self, stream: Stream, steps: range) -> None:
        self.stream, self.steps = stream, steps

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.stream.positions, self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _as_is(batch: Any) -> Any:  # `__getitems__` has made the batch already
    return batch


class Stream:
    """Batches of one rank, from any step on.

    `batch_size` is global: rank r of W takes positions r*B/W to (r+1)*B/W - 1 of each batch.
    Raises DataError when W does not divide the batch.
    """

    def __init__(
        self,
        shards: Shards,
        config: DataConfig,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise DataError(f"batch_size {batch_size} does not divide over {world_size} ranks; change run.batch_size")
        packs = [shards, *(Shards(folder, verify=rank == 0) for folder in config.mix)]
        for pack in packs:
            if not len(pack):
                raise DataError(f"{pack.folder} holds no sample")
        self.samples = _Samples(packs, config, image_size, seed)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def positions(self, step: int) -> list[int]:
        """Global positions of this rank's share of the batch of `step` (counted from 0)."""
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        return list(range(start, start + share))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop - 1. Stops with DataError when too many samples are bad."""
        loader = DataLoader(
            self.samples,
            batch_sampler=_Steps(self, range(start, stop)),
            num_workers=self.samples.config.workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.samples.config.workers else None,
        )
        seen, skipped = 0, Counter[str]()
        for batch in loader:
            seen += len(batch.captions) + batch.skipped.total()
            skipped += batch.skipped
            # A handful of bad samples at the very start says nothing about the share of them in the whole.
            if skipped.total() > self.samples.config.max_bad_fraction * max(seen, 1000) or not batch.captions:
                reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
                raise DataError(
                    f"{skipped.total()} of {seen} samples are bad ({reasons}), more than data.max_bad_fraction = "
                    f"{self.samples.config.max_bad_fraction}; pack the data again or raise the limit"
                )
            yield batch
