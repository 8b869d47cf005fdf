"""What can be added without touching the rest: tables of name -> object, which is imported when it is first used.

A package of somebody else's adds to a table by an entry point of the table's group, in its pyproject.toml:

    [project.entry-points."clipkit.samplers"]
    euler-maruyama = "my_package:euler_maruyama"

Importing this module is light: commands, choices and help texts are made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from clipkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """Where an object is, as "module:attribute", and one line of help."""

    target: str
    help: str

    def load(self) -> Any:
        """Import the object. Raises ImportError and AttributeError when it is not there."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


class Registry(Mapping[str, T], Generic[T]):
    """A table of one kind of thing: clipkit's own, then those that installed packages register by entry points.

    Args:
        noun: what an entry is, for messages, such as "sampler"; the entry points' group is "clipkit.<noun>s".
        own: clipkit's entries.
    """

    def __init__(self, noun: str, own: Mapping[str, Entry]) -> None:
        self.noun, self.own = noun, dict(own)

    @property
    def group(self) -> str:
        """The entry points' group."""
        return f"clipkit.{self.noun.replace(' ', '_')}s"

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every name with its entry. Raises UsageError when two packages use one name."""
        from importlib.metadata import entry_points

        found, owners = dict(self.own), dict.fromkeys(self.own, "clipkit")
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            package = _package(point)
            if point.name in found:
                raise UsageError(
                    f"{self.noun} {point.name!r} is registered by {owners[point.name]} and by {package}; uninstall one"
                )
            found[point.name], owners[point.name] = Entry(point.value, f"from {package}"), package
        return found

    def __getitem__(self, name: str) -> T:
        """The object of this name. Raises UsageError for an unknown one, and when its package cannot be imported."""
        entry = self.entry(name)
        try:
            found: T = entry.load()
        except (ImportError, AttributeError) as error:
            if name in self.own:
                raise
            raise UsageError(f"{self.noun} {name!r} ({entry.help}) cannot be imported: {error}") from None
        return found

    def entry(self, name: str) -> Entry:
        """The entry of this name, not imported. Raises UsageError for an unknown one."""
        if name not in self.entries:
            raise UsageError(f"unknown {self.noun} {name!r}; {did_you_mean(name, self.entries)}")
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]


TOWERS: Registry[Any] = Registry(
    "tower",
    {
        "clipkit_resnet": Entry("clipkit.models.towers:SmallResNet", "a residual network for images of some 32 pixels"),
        "clipkit_resnet9": Entry("clipkit.models.towers:PooledResNet", "its slower and more accurate variant"),
    },
)
"""Image encoders beside timm's: constructors of modules that keep the contract of clipkit/models/towers.py."""

EXPORT_FORMATS: Registry[Any] = Registry(
    "export format",
    {
        "open_clip": Entry("clipkit.convert.export:write_open_clip", "a folder that open_clip reads"),
        "transformers": Entry("clipkit.convert.export:write_transformers", "a folder that transformers reads"),
        "onnx": Entry("clipkit.convert.onnx:write_onnx", "two ONNX graphs"),
        "torch": Entry("clipkit.convert.onnx:write_programs", "two torch.export programs"),
    },
)
"""Writers `(clip, folder, name) -> files written`."""
