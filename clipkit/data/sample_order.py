"""Which sample stands where in the endless sequence: a function of (seed, epoch, position) and of nothing else.

Epoch e visits the shards in the order drawn from (seed, e), and permutes the samples of `data.shuffle_window`
shards at a time; for a pack in a folder that is all of them, and the epoch is one permutation of its samples. The
epochs follow each other without a seam, each sample coming once in each.

Several packs are mixed in fixed shares: which of them a position belongs to is a function of (seed, position) too, and
each keeps its own epochs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from clipkit.config import SMALLEST_SHARE

BLOCK = round(1 / SMALLEST_SHARE)
"""Positions in which a mixture holds its shares exactly."""


class Mixture:
    """Position of the whole -> (pack, position in the pack's own endless sequence).

    Every BLOCK positions hold each pack's share, exact to 1 / BLOCK, in an order drawn from (seed, block).
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        exact = np.array(shares) / sum(shares) * BLOCK
        self.quotas = np.floor(exact).astype(np.int64)
        largest_remainders = np.argsort(self.quotas - exact, kind="stable")
        self.quotas[largest_remainders[: BLOCK - self.quotas.sum()]] += 1
        self.seed, self._block, self._order = seed, -1, np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """Where the sample at this position comes from."""
        if len(self.quotas) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK)
        if block != self._block:
            packs = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._block, self._order = block, np.random.default_rng([self.seed, 2, block]).permutation(packs)
        pack = int(self._order[offset])
        return pack, block * int(self.quotas[pack]) + int((self._order[:offset] == pack).sum())


class Order:
    """Position in a pack's own endless sequence -> sample, by windows of shards.

    `window` shards are permuted together, 0 for all. A sample's place in its epoch is spread over the whole epoch as
    its shard is, and over the window within it.
    """

    def __init__(self, starts: Sequence[int], window: int, seed: int, pack: int = 0) -> None:
        self.starts, self.seed, self.pack = starts, seed, [pack] if pack else []
        self.window = window or len(starts)
        self._epoch, self._shards, self._ends = -1, np.empty(0, dtype=np.int64), [0]
        self._filled: tuple[int, int] | None = None
        self._samples = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        """The sample at this position."""
        epoch, offset = divmod(position, self.starts[-1])
        self._turn_to(epoch)
        window = bisect.bisect_right(self._ends, offset)
        if self._filled != (epoch, window):
            self._samples, self._filled = self._permute(epoch, window), (epoch, window)
        return int(self._samples[offset - (self._ends[window - 1] if window else 0)])

    def shards(self, window: int) -> list[int]:
        """Shards of a window of the epoch last asked for."""
        found: list[int] = self._shards[window * self.window : (window + 1) * self.window].tolist()
        return found

    @property
    def current(self) -> tuple[int, int] | None:
        """Epoch and window of the position last asked for."""
        return self._filled

    def _turn_to(self, epoch: int) -> None:
        if self._epoch == epoch:
            return
        n = len(self.starts) - 1
        everything = self.window >= n
        rng = np.random.default_rng([self.seed, 3, epoch, *self.pack])
        self._epoch, self._shards = epoch, np.arange(n) if everything else rng.permutation(n)
        sizes = np.diff(self.starts)[self._shards]
        self._ends = list(accumulate(int(sizes[i : i + self.window].sum()) for i in range(0, n, self.window)))

    def _permute(self, epoch: int, window: int) -> np.ndarray[Any, Any]:
        runs = [np.arange(self.starts[s], self.starts[s + 1]) for s in self.shards(window)]
        later = [4, window] if window else []
        return np.random.default_rng([self.seed, epoch, *self.pack, *later]).permutation(np.concatenate(runs))
