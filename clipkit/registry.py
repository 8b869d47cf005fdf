"""What can be added without touching the rest: tables of name -> object, which is imported when it is first used.

A package of somebody else's adds to a table by an entry point of the table's group, in its pyproject.toml:

    [project.entry-points."clipkit.samplers"]
    euler-maruyama = "my_package:euler_maruyama"

Importing this module is light: commands, choices and help texts are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from clipkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor

    from clipkit.train.launch import TaskSpec

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
        noun: what an entry is, for messages, such as "sampler"; its plural is the entry points' group:
            "clipkit.samplers".
        own: clipkit's entries.
    """

    def __init__(self, noun: str, own: Mapping[str, Entry]) -> None:
        self.noun, self.own = noun, dict(own)

    @property
    def group(self) -> str:
        """The entry points' group."""
        plural = "es" if self.noun.endswith("s") else "s"
        return f"clipkit.{self.noun.replace(' ', '_')}{plural}"

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


@dataclass(frozen=True)
class TaskEntry(Entry):
    """A trainable task, and the command that trains it."""

    command: str
    example: str
    """A shipped recipe."""


TASKS: Registry[TaskSpec[Any]] = Registry(
    "task",
    {
        "clip": TaskEntry("clipkit.train.pretrain:SPEC", "Pretrain CLIP on a pack.", "pretrain", "drawings_clip.toml"),
        "denoiser": TaskEntry(
            "clipkit.train.denoiser:SPEC",
            "Train a diffusion denoiser on a pack's images.",
            "denoiser",
            "drawings_denoiser.toml",
        ),
        "noisy_clip": TaskEntry(
            "clipkit.train.noisy_clip:SPEC",
            "Fine-tune a CLIP on noised images.",
            "noisy-clip",
            "drawings_noisy_clip.toml",
        ),
        "noisy_classifier": TaskEntry(
            "clipkit.train.noisy_classifier:SPEC",
            "Train a noise-aware classifier on a classed pack.",
            "noisy-classifier",
            "drawings_noisy_classifier.toml",
        ),
        "autoencoder": TaskEntry(
            "clipkit.train.autoencoder:SPEC",
            "Train an autoencoder for latents on a pack's images.",
            "autoencoder",
            "emoji_autoencoder.toml",
        ),
    },
)
"""Kind of a run, as its checkpoints record it -> how it is trained and loaded. Entry points: clipkit.tasks."""


LOSSES: Registry[Callable[..., Tensor]] = Registry(
    "loss",
    {
        "info_nce": Entry("clipkit.train.losses:info_nce", "a pair against all others of the batch (CLIP, InfoNCE)"),
        "sigmoid": Entry("clipkit.train.losses:sigmoid_loss", "each image and text by themselves (SigLIP)"),
    },
)
"""Contrastive losses of pretraining, `loss.kind`. Entry points: clipkit.losses.

A loss is a function of `image` and `text`, unit vectors [b, D] of this rank's pairs, and `logit_scale` [b]; of
`logit_bias` [b], `groups` (int64 [b] or None) and `label_smoothing` it takes those that it uses. It returns a scalar
whose mean over ranks is minimised (`distributed.mean_over_batch`, `distributed.all_gather`).
"""


def task_entry(kind: str) -> TaskEntry:
    """A task's entry; another package's command is named after its kind. Raises UsageError for an unknown kind."""
    entry = TASKS.own.get(kind) or TASKS.entry(kind)
    if isinstance(entry, TaskEntry):
        return entry
    return TaskEntry(entry.target, f"Train a {kind} ({entry.help}).", kind.replace("_", "-"), "RECIPE.toml")
