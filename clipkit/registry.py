"""Registries: tables of name -> object, imported when first used, to which other packages add by entry points.

A package adds to a table by an entry point of the table's group, in its pyproject.toml:

    [project.entry-points."clipkit.samplers"]
    euler-maruyama = "my_package:euler_maruyama"

Importing this module is light: commands, choices and help texts are made from it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from clipkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor

    from clipkit.data.sources import Source
    from clipkit.guidance.guiders import GuiderFactory
    from clipkit.guidance.samplers import Sampler
    from clipkit.guidance.schedule import Spacing
    from clipkit.train.launch import TaskSpec
    from clipkit.zeroshot.datasets import OpenDataset

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def declares(**attributes: Any) -> Callable[[F], F]:
    """Decorator: attributes by which a sampler or a guider's factory says what it does, set on the function."""

    def mark(function: F) -> F:
        vars(function).update(attributes)
        return function

    return mark


@dataclass(frozen=True)
class Entry:
    """Where an object is, as "module:attribute", and one line of help."""

    target: str
    help: str

    def load(self) -> Any:
        """Import the object. Raises ImportError and AttributeError when it is not there."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class ForeignEntry(Entry):
    """An entry of another package. Several packages may use one name; then none of them is imported."""

    points: tuple[EntryPoint, ...]

    @classmethod
    def of(cls, points: Sequence[EntryPoint]) -> ForeignEntry:
        """The entry of entry points with one name."""
        packages = " and ".join(map(_package, points))
        return cls(points[0].value, f"from {packages}", tuple(points))

    def load(self) -> Any:
        """Import the object. Raises whatever the import raises."""
        return self.points[0].load()


class Registry(Mapping[str, T], Generic[T]):
    """A table of one kind of thing: clipkit's own, then those that installed packages register by entry points.

    A package can break none of clipkit's entries: a name of clipkit's remains clipkit's, and so does one that cannot be
    given on the command line. A line on stderr says so when the table is listed or the name is used.

    Args:
        noun: what an entry is, for messages, such as "sampler"; its plural is the entry points' group:
            "clipkit.samplers".
        own: clipkit's entries.
        methods: the methods that an object of another package must have; without any it must be callable.
        reserved: names that no package can use.
    """

    def __init__(
        self, noun: str, own: Mapping[str, Entry], methods: Sequence[str] = (), reserved: Sequence[str] = ()
    ) -> None:
        self.noun = noun
        self.own = dict(own)
        self.methods = methods
        self.reserved = reserved
        self._ignored: list[tuple[str, str]] = []

    @property
    def group(self) -> str:
        """The entry points' group."""
        plural = "es" if self.noun.endswith("s") else "s"
        return f"clipkit.{self.noun.replace(' ', '_')}{plural}"

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every name with its entry."""
        foreign: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(self.group):
            if problem := self._unusable(point.name):
                line = f"clipkit: {self.noun} {point.name!r} of package {_package(point)} is ignored: {problem}"
                self._ignored.append((point.name, line))
            else:
                foreign.setdefault(point.name, []).append(point)
        return {**self.own, **{name: ForeignEntry.of(points) for name, points in foreign.items()}}

    def _unusable(self, name: str) -> str:
        """Why no package can use this name; empty if one can."""
        if name in self.own:
            return "clipkit has that name"
        if name in self.reserved:
            return f"{name}:PLACE has another meaning"
        return "" if name and not re.search(r"[\s:]", name) else "a name is not empty, without ':' and white space"

    def _report_ignored(self, names: Collection[str]) -> None:
        """Say once which entries of these names are ignored."""
        for name, line in self._ignored:
            if name in names:
                from clipkit.log import remark

                remark(line)
        self._ignored = [(name, line) for name, line in self._ignored if name not in names]

    def __getitem__(self, name: str) -> T:
        """The object of this name.

        Raises UsageError for an unknown name, one that two packages use, and an object of another package that cannot
        be imported or is of the wrong kind.
        """
        entry = self.entry(name)
        found: T = entry.load() if not isinstance(entry, ForeignEntry) else self._load(name, entry)
        return found

    def _load(self, name: str, entry: ForeignEntry) -> Any:
        if len(entry.points) > 1:
            packages = " and by ".join(map(_package, entry.points))
            raise UsageError(f"{self.noun} {name!r} is registered by {packages}; uninstall one")
        what = f"{self.noun} {name!r} ({entry.help})"
        try:
            found = entry.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"{what} cannot be imported: {reason}") from error
        lacking = [method for method in self.methods if not callable(getattr(found, method, None))]
        if lacking:
            raise UsageError(f"{what} is of type {type(found).__name__}, which has no {lacking[0]}; it must have one")
        if not self.methods and not callable(found):
            raise UsageError(f"{what} is of type {type(found).__name__}; it must be callable")
        return found

    def entry(self, name: str) -> Entry:
        """The entry of this name, not imported. Raises UsageError for an unknown one."""
        if name not in self.entries:
            raise UsageError(f"unknown {self.noun} {name!r}; {did_you_mean(name, self.entries)}")
        self._report_ignored([name])
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        names = iter(self.entries)
        self._report_ignored([name for name, _ in self._ignored])
        return names

    def __len__(self) -> int:
        return len(self.entries)


def _entry_points(group: str) -> list[EntryPoint]:
    """A group's entry points in installed packages, by name.

    Importing importlib.metadata takes a quarter of `clipkit --help`, so that it is only done if a file names the group.
    """
    files = (file for folder in sys.path for file in Path(folder).glob("*.*-info/entry_points.txt"))
    if not any(f"[{group}]".encode() in file.read_bytes() for file in files if os.access(file, os.R_OK)):
        return []
    from importlib.metadata import entry_points

    return sorted(entry_points(group=group), key=lambda point: point.name)


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
    methods=("run", "recipe", "load"),
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


SOURCES: Registry[Callable[..., Source]] = Registry(
    "source",
    {
        "folder": Entry("clipkit.data.sources:class_source", "FOLDER or tar laid out <class>/<image>"),
        "csv": Entry("clipkit.data.sources:csv_source", "FOLDER or tar of images, with --csv"),
        "dataset": Entry("clipkit.zeroshot.datasets:dataset_source", "NAME of a data set for zeroshot"),
        "pictograms": Entry("clipkit.data.pictograms:pictograms_source", "FOLDER of captions.csv and pictograms"),
        "drawings": Entry("clipkit.data.sources:drawings_source", "drawings of one object, rendered"),
        "scenes": Entry("clipkit.data.sources:scenes_source", "scenes of one to three objects, rendered"),
    },
)
"""Sources of `clipkit pack`: functions -> `clipkit.data.sources.Source`.

A source's parameters are the options of `clipkit pack` that have an effect on it; the others are refused. One with a
parameter `source` is named NAME:PLACE on the command line, one without it NAME."""


def _described_datasets() -> dict[str, Entry]:
    """The data sets that zeroshot/data/datasets.json describes."""
    file = Path(__file__).with_name("zeroshot") / "data" / "datasets.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Entry(f"clipkit.zeroshot.named:{name}", "; ".join(about["source"].split("; ")[:2]))
        for name, about in described.items()
    }


DATASETS: Registry[OpenDataset] = Registry(
    "dataset", _described_datasets(), reserved=("folder", "tar", "csv", "shards", "wds")
)
"""Labelled images by name, for zero-shot evaluation, linear probes and packs."""


SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    {
        "dpmpp-2m": Entry("clipkit.guidance.samplers:dpmpp_2m", "DPM-Solver++(2M), second order; 1 NFE a step"),
        "dpmpp-2m-sde": Entry("clipkit.guidance.samplers:dpmpp_2m_sde", "SDE-DPM-Solver++(2M), stochastic; 1 NFE"),
        "dpmpp-2s": Entry("clipkit.guidance.samplers:dpmpp_2s", "DPM-Solver++(2S), singlestep; 2 NFE"),
        "heun": Entry("clipkit.guidance.samplers:heun", "Heun's method (EDM, algorithm 1); 2 NFE"),
        "unipc": Entry("clipkit.guidance.samplers:unipc", "UniPC of order 2, predictor-corrector; 1 NFE"),
        "ddim": Entry("clipkit.guidance.samplers:ddim", "DDIM, eta = 0, first order; 1 NFE"),
        "ddpm": Entry("clipkit.guidance.samplers:ddpm", "DDPM, ancestral sampling; 1 NFE"),
    },
)
"""From noise to images along a list of lambdas. NFE: network function evaluations."""

SPACINGS: Registry[Spacing] = Registry(
    "spacing",
    {
        "karras": Entry("clipkit.guidance.schedule:karras_spacing", "EDM's, rho = 7"),
        "linspace": Entry("clipkit.guidance.schedule:linspace", "evenly in time, with both ends"),
        "leading": Entry("clipkit.guidance.schedule:leading", "evenly in time, with the cleanest level"),
        "trailing": Entry("clipkit.guidance.schedule:trailing", "evenly in time, with the noisiest level"),
    },
)
"""Where on the noise schedule a sampler's steps lie."""

GUIDERS: Registry[GuiderFactory] = Registry(
    "guider",
    {
        "autoguidance": Entry(
            "clipkit.guidance.guider_factories:autoguidance",
            "away from a weaker denoiser (Karras et al. 2024); guide=RUN, scale=2",
        ),
        "cfg++": Entry(
            "clipkit.guidance.guider_factories:cfg_plus_plus",
            "classifier-free guidance on the data manifold, with ddim (Chung et al. 2024); scale=0.6",
        ),
        "universal": Entry(
            "clipkit.guidance.guider_factories:universal",
            "universal guidance: the clean CLIP's gradient through x0 (Bansal et al. 2023); scale=10, cutouts=0",
        ),
    },
)
"""Factories of guiders, whose contract is in clipkit/guidance/guiders.py."""


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
