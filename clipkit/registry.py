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

    from clipkit.guidance.guiders import GuiderFactory
    from clipkit.guidance.samplers import Sampler
    from clipkit.guidance.schedule import Spacing

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
