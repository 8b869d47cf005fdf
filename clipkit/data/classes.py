"""Classes: which one a file of a folder is of, their order, their names, and the templates that names are put into."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DataError, UsageError
from clipkit.log import remark

_SPLIT = re.compile(
    r"(?<![a-z])(train|training|trainval|val|valid|validation|dev|test|testing|eval|evaluation|pred)(?![a-z])", re.I
)
_DATE = re.compile(r"(19|20)\d\d([-_.](0[1-9]|1[0-2])([-_.][0-3]\d)?|(0[1-9]|1[0-2])[0-3]\d)?")
"""2019, 2019-05, 2019_05_31 or 20190531."""
Names = list[str]
"""Of one class; the first is the main one."""


def class_name(directory: str) -> str:
    """A class's name out of a directory's or a label's: no underscores or slashes, single spaces, valid Unicode."""
    words = directory.encode("utf-8", "replace").decode("utf-8").replace("_", " ").replace("/", " ")
    return " ".join(words.split())


def say_alike(source: object, names: Iterable[str]) -> None:
    """A line on stderr about classes whose prompts are equal: Cat and cat, sea_lion and sea lion."""
    alike = [name for name, n in Counter(class_name(name).casefold() for name in names).items() if n > 1]
    if alike:
        remark(f"clipkit: {source}: several classes are called {', '.join(map(repr, alike))}, the same in a prompt")


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names, sorted; numbers, where all are, as numbers."""
    found = sorted(set(names))
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def are_consecutive(names: Sequence[str]) -> bool:
    """Whether names in their order are 0, 1, 2 ... or 1, 2, 3 ...: what is listed elsewhere has the same order."""
    return all(n.isdecimal() for n in names) and [int(n) - int(names[0]) for n in names] == list(range(len(names)))


@dataclass(frozen=True)
class Layout:
    """Position of the class folder in a path. classes: folder -> label.

    depth: number of folders above the class folder; None: the innermost known class folder counts.
    """

    classes: Mapping[str, int]
    depth: int | None = None

    @classmethod
    def of(cls, classes: Iterable[str], depth: int | None = None) -> Layout:
        """Labels in the order of `classes`."""
        return cls({name: i for i, name in enumerate(classes)}, depth)

    def label_of(self, name: str) -> int | None:
        """Label of the file at a path with slashes, or None if it has no class."""
        folders = name.split("/")[:-1]
        if self.depth is not None:
            return self.classes.get(folders[self.depth]) if len(folders) > self.depth else None
        return next((self.classes[folder] for folder in reversed(folders) if folder in self.classes), None)

    def barren(self, names: Iterable[str]) -> list[str]:
        """Class folders that contain only skipped files, given the paths of those files."""
        above = self.depth or 0
        found = {parts[above] for parts in (name.split("/") for name in names) if len(parts) > above + 1}
        return sorted(found - self.classes.keys())


def layout(source: Path, names: Iterable[str], known: Collection[str] = ()) -> Layout:
    """Find the class folders of `<class>/<image>` layouts, for images at the paths `names` in `source`.

    The class is the first folder, as for torchvision's ImageFolder; deeper folders belong to it. A single folder above
    all others is skipped. `known` are names of class folders. Raises DataError if there is no class folder, for several
    splits (train, test), and if the class may be either the outer or the inner folder.
    """
    folders = {tuple(name.split("/")[:-1]): name for name in names}
    if not folders:
        raise DataError(f"{source} has no <class>/<image> layout: no JPEG, PNG or WebP image")
    if () in folders:
        raise DataError(f"{source} has no <class>/<image> layout: {folders[()]} is in no class folder")
    depth = _refuse_splits(source, folders, known)
    if known and all(any(part in known for part in f) for f in folders):
        return Layout.of(in_order(part for f in folders for part in f if part in known))
    outer, inner = _levels(folders, depth)
    if depth:
        above = "/".join(next(iter(folders))[:depth])
        remark(f"clipkit: {source}: all images are in {above}/; its folders are the classes")
    if inner:
        deepest = next(name for f, name in sorted(folders.items()) if len(f) > depth + 1)
        first, second = deepest.split("/")[depth : depth + 2]
        words = all(any(c.isalpha() for c in name) for name in inner)
        if words and len(inner) > len(outer) and all(len(f) > depth + 1 for f in folders):
            raise DataError(
                f"{source} has folders in folders ({deepest}): the class may be {first!r} or {second!r}; name the "
                "class folders in a table of class names (folder -> name), or give a folder that has them at its top"
            )
        remark(f"clipkit: {source}: images in deeper folders ({deepest}) have the class of the first, {first!r}")
    return Layout.of(in_order(outer), depth)


def named_layout(source: Path, names: Iterable[str], classes: Collection[str]) -> Layout:
    """The layout for known class folders, in their order: files outside of them have no class."""
    folders = {tuple(name.split("/")[:-1]) for name in names} - {()}
    if folders:
        _refuse_splits(source, folders, classes)
    return Layout.of(classes)


def _levels(folders: Collection[tuple[str, ...]], depth: int) -> tuple[set[str], set[str]]:
    """Names of the folders at this depth, and one level below."""
    return {f[depth] for f in folders if len(f) > depth}, {f[depth + 1] for f in folders if len(f) > depth + 1}


def _refuse_splits(source: Path, folders: Collection[tuple[str, ...]], known: Collection[str]) -> int:
    """Depth of the class folders. Raises DataError for several splits, side by side or within each class."""
    depth = 0
    while len({f[depth] for f in folders}) == 1 and all(len(f) > depth + 1 for f in folders):
        if all(_DATE.fullmatch(f[depth + 1]) for f in folders):  # of one class
            break
        depth += 1
    above = "/".join((str(source), *next(iter(folders))[:depth]))
    outer, inner = _levels(folders, depth)
    splits = _splits(outer, known) or _alike_inside(folders, depth, known)
    if len(splits) > 1 and (
        len(splits) == len(outer) or all(len(f) > depth + 1 for f in folders if f[depth] in splits)
    ):
        how = f"such as {above}/{splits[0]}" if source.is_dir() else "unpacked"
        raise DataError(f"{above} holds several splits ({', '.join(splits)}); give one of them, {how}")
    splits = _splits(inner, known)
    if 1 < len(splits) == len(inner):
        raise DataError(
            f"{above} holds several splits ({', '.join(splits)}) of each class; put one of them into a folder by "
            "itself (symbolic links are followed)"
        )
    return depth


def _splits(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Names that differ only in the word for a split: train and test, seg_train and seg_test."""
    alike: dict[str, list[str]] = {}
    for name in set(names) - set(known):
        rest, found = _SPLIT.subn("", name, count=1)
        if found:
            alike.setdefault(rest.rstrip("0123456789").strip("-_ ").casefold(), []).append(name)
    return sorted(name for group in alike.values() if len(group) > 1 for name in group)


def _alike_inside(folders: Collection[tuple[str, ...]], depth: int, known: Collection[str]) -> list[str]:
    """Names that all contain a word for a split, and two or more equal folders: train_images and test_pics."""
    outer = {f[depth] for f in folders if len(f) > depth}
    if outer & set(known) or not all(_SPLIT.search(name) for name in outer):
        return []
    held = [{f[depth + 1] for f in folders if f[depth] == name and len(f) > depth + 1} for name in outer]
    return sorted(outer) if len(set[str].intersection(*held)) > 1 else []


def fit_names(
    given: Mapping[str, Names] | Sequence[Names],
    keys: Sequence[str],
    names: Sequence[str],
    ordered: bool,
    what: str,
) -> list[Names]:
    """Names for classes that others know by `keys` (folders, labels) and call `names`, in their order.

    A list whose entries are these names is put in order; one of other names is taken as it is if the order of the
    classes is known (`ordered`). Raises UsageError for a missing class, another length, and an order not known.
    """
    if isinstance(given, Mapping):
        spellings = [(k, class_name(k), n, n.replace(" ", "_")) for k, n in zip(keys, names, strict=True)]
        found = [next((given[s] for s in tried if s in given), None) for tried in spellings]
        if missing := [k for k, entry in zip(keys, found, strict=True) if entry is None]:
            raise UsageError(f"{what} has no names for class {missing[0]!r} ({len(missing)} missing)")
        return [entry for entry in found if entry is not None]
    if len(given) != len(keys):
        raise UsageError(f"{what} lists {len(given)} classes; the data set has {len(keys)}")
    if (order := _order_by_name(given, keys, names)) is not None:
        if order != sorted(order):
            remark(f"clipkit: {what}: put into the order of the classes, by their names")
        return [list(given[i]) for i in order]
    if ordered:
        ends = ", ".join(f"{keys[i]!r} is {given[i][0]!r}" for i in (0, -1))
        remark(f"clipkit: {what}: taken in the order of the classes: {ends}")
        return [list(entry) for entry in given]
    raise UsageError(
        f"{what}: in which order it names the {len(keys)} classes cannot be known, as they are called otherwise "
        f"({', '.join(keys[:3])} ...); write a JSON object instead, {{{keys[0]!r}: its name, ...}}"
    )


def _order_by_name(given: Sequence[Names], keys: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """For each class the entry that has its name, where at most one has another; the last one left is of that."""
    place: dict[str, int] = {}
    for i, spellings in enumerate(zip(keys, names, strict=True)):
        for spelling in {class_name(s).casefold() for s in spellings}:
            if spelling in place:  # two classes of one name
                return None
            place[spelling] = i
    order: dict[int, int] = {}
    for j, entry in enumerate(given):
        classes = {place[s] for s in (class_name(n).casefold() for n in entry) if s in place}
        if len(classes) == 1 and not classes & order.keys():
            order[classes.pop()] = j
    if len(order) < len(keys) - 1:
        return None
    left = set(range(len(given))) - set(order.values())
    return [order[i] if i in order else left.pop() for i in range(len(keys))]


def checked_templates(templates: Sequence[str], where: str = "") -> list[str]:
    """Templates with one `{}` each for the class's name; CLIP_benchmark's `{c}` is the same.

    Raises UsageError, naming the template, where that is missing, is there twice, or other braces are.
    """
    found = []
    for template in templates:
        found.append(template.replace("{c}", "{}"))
        if found[-1].count("{}") != 1 or set("{}") & set(found[-1].replace("{}", "")):
            raise UsageError(
                f"{where}{': ' if where else ''}template {template!r} must hold exactly one {{}} where the class name "
                "goes, and no other braces"
            )
    return found


def fill(template: str, name: str) -> str:
    """A template of `checked_templates` with a name in it."""
    return template.replace("{}", name)
