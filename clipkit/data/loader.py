"""Data loader: positions of the sample order (sample_order.py) -> decoded, augmented, tokenised batches.

Batch k is positions k*B to (k+1)*B - 1. A run can start at any step without replaying earlier ones, and the order does
not depend on ranks, workers or time.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipkit.config import DataConfig
from clipkit.data.images import flip_and_jitter, random_view
from clipkit.data.remote import Cache
from clipkit.data.sample_order import BLOCK, Mixture, Order
from clipkit.data.shards import Shards
from clipkit.errors import DataError, SampleError, ShardError
from clipkit.models.tokenizer import AnyTokenizer

_REMOTE_WINDOW = 16
_DYING = 5.0
"""Seconds between the ends of two pipes of a process that dies."""


@dataclass
class Batch:
    """A rank's share of one step.

    images: uint8 [b, 3, S, S]. captions: b strings. groups: int64 [b]; samples of one group have interchangeable
    captions (the class of a classed pack, the hash of the caption elsewhere). skipped: number of bad samples by reason.
    tokens: token ids of each caption, by the key of each tokenizer that the loader was given.
    """

    images: Tensor
    captions: list[str]
    groups: Tensor
    keys: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        images, groups = (t.to(device, non_blocking=True) for t in (self.images, self.groups))
        return dataclasses.replace(self, images=images, groups=groups)

    def token_ids(self, tokenizer: AnyTokenizer) -> list[list[int]]:
        """Each caption's token ids, tokenised by the loader if it was given this tokenizer, else now."""
        found = self.tokens.get(tokenizer.key)
        return tokenizer.encode(self.captions) if found is None else found

    def ids(self, tokenizer: AnyTokenizer) -> Tensor:
        """The captions' token ids, int64 [b, L] on the CPU, L being the longest caption."""
        return tokenizer.pad(self.token_ids(tokenizer))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; DataLoader calls this."""
        return dataclasses.replace(self, images=self.images.pin_memory(), groups=self.groups.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """`parts` micro-batches of nearly equal size, in order, or as many as there are samples, without `skipped`.

        A batch whose samples were all skipped is one empty part.
        """
        parts = max(1, min(parts, len(self)))
        edges = [len(self) * i // parts for i in range(parts + 1)]
        return [self._part(slice(*edge)) for edge in pairwise(edges)]

    def _part(self, rows: slice) -> Batch:
        tokens = {key: ids[rows] for key, ids in self.tokens.items()}
        return Batch(self.images[rows], self.captions[rows], self.groups[rows], self.keys[rows], tokens=tokens)


class _Samples(Dataset["Batch | ShardError"]):
    """Global positions -> decoded, augmented samples; each sample's randomness comes from (seed, position).

    A shard that cannot be read is returned as its error: raised in a loader process, it would come with a traceback.
    """

    def __init__(
        self,
        packs: Sequence[Shards],
        config: DataConfig,
        image_size: int,
        seed: int,
        early: tuple[int, int],
        tokenizers: Sequence[AnyTokenizer],
    ) -> None:
        self.packs, self.config, self.image_size, self.seed, self.early = packs, config, image_size, seed, early
        self.tokenizers = {tokenizer.key: tokenizer for tokenizer in tokenizers}
        self.mixture = Mixture([1 - sum(config.mix.values()), *config.mix.values()], seed)
        windows = [config.shuffle_window or (_REMOTE_WINDOW if pack.store.remote else 0) for pack in packs]
        self.orders = [Order(p.starts, w, seed, i) for i, (p, w) in enumerate(zip(packs, windows, strict=True))]
        # Per worker: its process id and current position, to report what a killed worker was reading.
        self.whereabouts = torch.full((max(1, config.workers), 2), -1, dtype=torch.int64)
        self.whereabouts.share_memory_()  # type: ignore[no-untyped-call]
        self._fetching: dict[int, tuple[int, int]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Pack and sample at this position of the endless sequence."""
        pack, own = self.mixture(position)
        return pack, self.orders[pack](own)

    def name(self, position: int) -> str:
        """Shard and number of the sample at a position."""
        pack, index = self.locate(position)
        return self.packs[pack].name(index)

    def __getitem__(self, position: int) -> Batch | ShardError:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch | ShardError:
        with warnings.catch_warnings():  # Pillow warns of odd metadata, and raises errors that matter
            warnings.simplefilter("ignore")
            try:
                return self._load(positions)
            except ShardError as error:
                return error

    def _load(self, positions: list[int]) -> Batch:
        views, captions, groups, keys, rngs = [], [], [], [], []
        skipped: Counter[str] = Counter()
        worker = getattr(torch.utils.data.get_worker_info(), "id", 0)
        early_size, early_positions = self.early
        size = early_size if positions[0] < early_positions else self.image_size
        for position in positions:
            self.whereabouts[worker, 1] = position
            rng = np.random.default_rng([self.seed, 1, position])
            try:
                pack, index = self.locate(position)
                self._prefetch(pack)
                sample = self.packs[pack].read(index)
                views.append(random_view(sample.image, size, self.config, rng).permute(1, 2, 0))
            except SampleError as error:
                skipped[error.reason] += 1
                continue
            rngs.append(rng)
            captions.append(sample.captions[rng.integers(len(sample.captions))])
            label = zlib.crc32(sample.captions[0].encode()) if sample.label is None else sample.label
            groups.append(label + (pack << 32))  # class 3 of one pack is not class 3 of another
            keys.append(sample.key)
        # [b, S, S, 3] in memory, as the decoder left them -> [b, 3, S, S]
        images = torch.stack(views) if views else torch.empty(0, size, size, 3, dtype=torch.uint8)
        images = flip_and_jitter(images.permute(0, 3, 1, 2), self.config, rngs, captions)
        tokens = {key: tokenizer.encode(captions) for key, tokenizer in self.tokenizers.items()}
        return Batch(images, captions, torch.tensor(groups, dtype=torch.int64), keys, skipped, tokens)

    def _prefetch(self, pack: int) -> None:
        """At the start of a window of a remote pack, fetch the next window in the background."""
        order, shards = self.orders[pack], self.packs[pack]
        if not shards.store.remote or order.current is None or self._fetching.get(pack) == order.current:
            return
        self._fetching[pack] = order.current
        coming = order.shards(order.current[1] + 1)
        threading.Thread(target=shards.prefetch, args=(coming,), daemon=True).start()

    def begin_worker(self, worker: int) -> None:
        """Initialise a worker process.

        Terminals, `timeout` and schedulers signal whole process groups. The main process stops after saving, and needs
        its workers until then.
        """
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":  # other systems do not tell a signal's sender
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_if_the_parent_says_so, daemon=True).start()
        # torch's own check of the parent fails when another process forked this one, and when the queue is full.
        threading.Thread(target=_die_with_parent, daemon=True).start()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker; else a forked process warns
        self.whereabouts[worker, 0] = os.getpid()


def _end_if_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _die_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


class _Steps(Sampler[list[int]]):
    """The positions of each step, computed lazily."""

    def __init__(self, stream: Stream, steps: range) -> None:
        self.stream, self.steps = stream, steps

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.stream.positions, self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _as_is(batch: Any) -> Any:  # `__getitems__` has made the batch already
    return batch


class Stream:
    """The data loader: batches of one rank, starting at any step.

    `batch_size` is global: rank r of W takes positions r*B/W to (r+1)*B/W - 1 of each batch. Before step `early_steps`
    images are `early_size` wide, then `image_size`. `tokenizers` run in the worker processes (`Batch.ids`).
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
        early_size: int = 0,
        early_steps: int = 0,
        tokenizers: Sequence[AnyTokenizer] = (),
    ) -> None:
        if batch_size % world_size:
            raise DataError(f"batch_size {batch_size} does not divide over {world_size} ranks; change run.batch_size")
        cache, packs = cache_of(config), packs_of(shards, config)
        for pack in packs:
            if not len(pack):
                raise DataError(f"{pack.source} holds no sample")
        early = (early_size, early_steps * batch_size)
        self.samples = _Samples(packs, config, image_size, seed, early, tokenizers)
        for pack, order in zip(packs, self.samples.orders, strict=True):
            _fits(pack, order, cache)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._damage: ShardError | None = None

    @property
    def not_indexed(self) -> dict[str, int]:
        """Number of files skipped when the packs, or the manifests of shards made elsewhere, were made, by reason."""
        return dict(sum((Counter(pack.skipped) for pack in self.samples.packs), Counter[str]()))

    def epoch(self, step: int) -> int:
        """The epoch of the first pack in which a step begins."""
        share = self.samples.mixture.quotas[0] / BLOCK
        return int(step * self.batch_size * share // len(self.samples.packs[0]))

    def positions(self, step: int) -> list[int]:
        """Global positions of this rank's share of the batch of `step` (counted from 0)."""
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        return list(range(start, start + share))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop - 1.

        Rank 0 verifies the checksums of local shards in the background. Raises DataError when too many samples are bad,
        or a worker dies, and ShardError when a shard differs from the manifest.
        """
        config, rest = self.samples.config, threading.Event()
        loader = DataLoader(
            self.samples,
            batch_sampler=_Steps(self, range(start, stop)),
            num_workers=config.workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if config.workers else None,
            worker_init_fn=self.samples.begin_worker,
        )
        hashing = threading.Thread(target=self._hash_shards, args=(rest,), daemon=True)
        if self.rank == 0:
            hashing.start()
        try:
            yield from self._counted(iter(loader))
            if self.rank == 0:
                hashing.join()
                self._complain()
        except RuntimeError as error:
            raise self.explain(error) from error
        finally:
            rest.set()

    def _counted(self, batches: Iterator[Batch | ShardError]) -> Iterator[Batch]:
        config, seen, skipped = self.samples.config, 0, Counter[str]()
        for batch in batches:
            if isinstance(batch, ShardError):
                raise batch
            self._complain()
            seen += len(batch.captions) + batch.skipped.total()
            skipped += batch.skipped
            # A few bad samples at the start say little about their share.
            if skipped.total() > config.max_bad_fraction * max(seen, 1000) or not batch.captions:
                reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
                raise DataError(
                    f"{skipped.total()} of {seen} samples are bad ({reasons}), more than data.max_bad_fraction = "
                    f"{config.max_bad_fraction}; pack the data again or raise the limit"
                )
            yield batch

    def _hash_shards(self, rest: threading.Event) -> None:
        try:
            for pack in self.samples.packs:
                if not pack.store.remote:  # fetched shards are already checked
                    pack.verify(lambda: not rest.is_set())
        except (ShardError, OSError) as error:
            self._damage = error if isinstance(error, ShardError) else ShardError(str(error))

    def _complain(self) -> None:
        if self._damage is not None:
            raise self._damage

    def explain(self, error: Exception) -> Exception:
        """A DataError that names the shard which a dead worker was reading; any other error unchanged.

        torch names the dead process, unless its pipe ends first.
        """
        places = [(pid, at) for pid, at in self.samples.whereabouts.tolist() if pid > 0 and at >= 0]
        dead: set[int] = set()
        if isinstance(error, (OSError, EOFError)):
            try:
                dead = _dead({pid for pid, _ in places})
            except RuntimeError as said:  # torch reports it now
                error = said
        cut = [(pid, at) for pid, at in places if pid in dead]
        if "DataLoader worker" not in str(error) and not cut:
            return error
        reading = cut or [(pid, at) for pid, at in places if str(pid) in str(error)]
        where = self.samples.name(reading[0][1]) if reading else "its first batch"
        what = (str(error) or type(error).__name__).splitlines()[0]
        return DataError(
            f"a loader process died while reading {where}: {what}; the same command resumes from "
            "the last checkpoint. If it was killed for memory, lower data.workers"
        )


def _dead(loaders: set[int]) -> set[int]:
    """The dead or dying ones of these processes; pipes end before processes do."""
    alive = {child.pid: child for child in multiprocessing.active_children() if child.pid in loaders}
    if alive and len(alive) == len(loaders):
        ending = wait([child.sentinel for child in alive.values()], _DYING)
        for child in alive.values():
            if child.sentinel in ending:
                child.join()
    return loaders - {child.pid for child in multiprocessing.active_children()}


def cache_of(config: DataConfig) -> Cache:
    """The cache that the recipe sets for fetched shards."""
    return Cache(Path(config.cache), int(config.cache_gb * 2**30))


def packs_of(shards: Shards, config: DataConfig) -> list[Shards]:
    """The pack of a recipe, and the packs mixed in."""
    return [shards, *(Shards(folder, verify=False, cache=cache_of(config)) for folder in config.mix)]


def validation_of(config: DataConfig, verify: bool = False) -> Shards | None:
    """The validation set of a recipe, if any; with `verify`, its checksums are verified."""
    return Shards(config.val, verify, cache_of(config)) if config.val else None


def _fits(pack: Shards, order: Order, cache: Cache) -> None:
    """Check that two shuffle windows fit in the cache: the one in use and the one being fetched."""
    sizes = sorted((int(e["bytes"]) for e in pack.entries), reverse=True)
    needed = sum(sizes[: 2 * order.window])
    if pack.store.remote and needed > cache.limit:
        raise DataError(
            f"{pack.source}: two windows of {order.window} shards are {needed / 2**30:.1f} GiB, data.cache_gb is "
            f"{cache.limit / 2**30:.1f}; lower data.shuffle_window or raise it"
        )
