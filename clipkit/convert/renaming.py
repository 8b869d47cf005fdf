"""Tables of weight names that are read in both directions: other libraries' state dicts <-> ours.

A row pairs a name of theirs with one of ours. In both, `{i}` stands for a number and a `*` at the end for the rest of
the name; the first row that matches counts. A row with several names splits or joins tensors along the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from clipkit.errors import CheckpointError

Tensors = Mapping[str, Tensor]
Names = tuple[str, ...]
Convert = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Change:
    """How the tensors of a row differ: both functions take and return one tensor for each name."""

    to_ours: Convert
    to_theirs: Convert


def each(to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]) -> Change:
    """A change of single tensors."""
    return Change(lambda tensors: [to_ours(t) for t in tensors], lambda tensors: [to_theirs(t) for t in tensors])


def _joined(parts: Sequence[int]) -> Convert:
    """Tensors joined along the first axis, then split into parts of these proportions."""

    def convert(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = torch.cat(list(tensors))
        ends = accumulate(len(whole) * part // sum(parts) for part in parts)
        return whole.tensor_split(list(ends)[:-1])

    return convert


def split(theirs: Sequence[int], ours: Sequence[int]) -> Change:
    """One tensor, cut along the first axis into parts of these proportions on either side."""
    return Change(_joined(ours), _joined(theirs))


SAME = each(lambda t: t, lambda t: t)
TRANSPOSED = each(lambda t: t.T, lambda t: t.T)
BATCHED = each(lambda t: t[None], lambda t: t[0])
TOKEN = each(lambda t: t[None, None], lambda t: t.flatten())
SCALAR = each(lambda t: t.reshape(()), lambda t: t)
SCALAR_1D = each(lambda t: t.reshape(()), lambda t: t.reshape(1))


class Row:
    """Their name or names <-> ours, and how the tensors differ."""

    def __init__(self, theirs: str | Names, ours: str | Names, change: Change = SAME) -> None:
        self.theirs = (theirs,) if isinstance(theirs, str) else theirs
        self.ours = (ours,) if isinstance(ours, str) else ours
        self.change = change

    def under(self, prefix: str) -> Row:
        """The same row with `prefix` before their names."""
        return Row(tuple(prefix + name for name in self.theirs), self.ours, self.change)


class _Way:
    """A row read in one direction."""

    def __init__(self, sources: Names, targets: Names, convert: Convert) -> None:
        self.sources, self.targets, self.convert = sources, targets, convert
        self.first = _pattern(sources[0])


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(name))
    return re.compile(escaped.removesuffix(r"\*") + "(?P<rest>.+)" if name.endswith("*") else escaped)


def _filled(name: str, values: Mapping[str, str]) -> str:
    return name.removesuffix("*").format(**values) + (values["rest"] if name.endswith("*") else "")


@dataclass(frozen=True)
class Layout:
    """The names of one architecture in one library."""

    rows: tuple[Row, ...]
    legacy: tuple[Row, ...] = ()
    """Names that some files have as well: read, never written."""

    @cached_property
    def _reading(self) -> list[_Way]:
        return [_Way(row.theirs, row.ours, row.change.to_ours) for row in (*self.rows, *self.legacy)]

    @cached_property
    def _writing(self) -> list[_Way]:
        return [_Way(row.ours, row.theirs, row.change.to_theirs) for row in self.rows]

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Their state dict under our names; floats become float32.

        Raises CheckpointError naming tensors that no row knows, and parts of a split tensor that are missing.
        """
        return _translate({n: t for n, t in tensors.items() if not _NO_WEIGHTS.fullmatch(n)}, self._reading)

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """Our state dict under their names; floats become float32. Raises CheckpointError as `to_ours` does."""
        return _translate(tensors, self._writing)


_NO_WEIGHTS = re.compile(r"input_resolution|context_length|vocab_size|.*\.position_ids|(.*\.)?attn_mask")
"""Tensors that are no weights: sizes that OpenAI stores, and numbers that are computed."""


def _translate(tensors: Tensors, ways: Sequence[_Way]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in tensors:
        for way in ways:
            if (match := way.first.fullmatch(name)) is not None:
                sources = [_filled(source, match.groupdict()) for source in way.sources]
                used.update(sources)
                targets = [_filled(target, match.groupdict()) for target in way.targets]
                changed = way.convert([need(tensors, source) for source in sources])
                found.update(zip(targets, changed, strict=True))
                break
    if strangers := [name for name in tensors if name not in used and not name.endswith(".num_batches_tracked")]:
        raise CheckpointError(f"{len(strangers)} tensors belong to another architecture: {', '.join(strangers[:3])}")
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def need(tensors: Tensors, name: str) -> Tensor:
    """The tensor of this name. Raises CheckpointError when there is none."""
    if name not in tensors:
        raise CheckpointError(f"there is no tensor {name!r}; the file is cut, or of another architecture")
    return tensors[name]


def rows(*groups: Row | Sequence[Row]) -> tuple[Row, ...]:
    """Rows and groups of rows as one tuple."""
    return tuple(chain.from_iterable([group] if isinstance(group, Row) else group for group in groups))
