"""Modules and names of version 0.1: importing one warns, and gives what it is called now. They go with version 0.3."""

from __future__ import annotations

import importlib
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "clipkit.archives": "clipkit.convert.unpickling",
    "clipkit.classes": "clipkit.data.classes",
    "clipkit.commands.given": "clipkit.commands.arguments",
    "clipkit.drawings": "clipkit.data.drawings",
    "clipkit.export": "clipkit.convert.export",
    "clipkit.files": "clipkit.data.files",
    "clipkit.graphs": "clipkit.convert.onnx",
    "clipkit.guidance.autoencoder": "clipkit.guidance.networks.autoencoder",
    "clipkit.guidance.classifier": "clipkit.guidance.networks.classifier",
    "clipkit.guidance.condition": "clipkit.guidance.networks.condition",
    "clipkit.guidance.curve": "clipkit.guidance.metrics.noise_curve",
    "clipkit.guidance.dit": "clipkit.guidance.networks.dit",
    "clipkit.guidance.draw": "clipkit.guidance.pipeline",
    "clipkit.guidance.extractors": "clipkit.guidance.metrics.extractors",
    "clipkit.guidance.layers": "clipkit.guidance.networks.layers",
    "clipkit.guidance.likeness": "clipkit.guidance.metrics.pairwise",
    "clipkit.guidance.noisy_clip": "clipkit.guidance.networks.noisy_clip",
    "clipkit.guidance.parts": "clipkit.guidance.components",
    "clipkit.guidance.sheet": "clipkit.guidance.image_grid",
    "clipkit.guidance.steering": "clipkit.guidance.config",
    "clipkit.guidance.unet": "clipkit.guidance.networks.unet",
    "clipkit.hub": "clipkit.convert.hub",
    "clipkit.images": "clipkit.data.images",
    "clipkit.inspection": "clipkit.data.inspection",
    "clipkit.losses": "clipkit.train.losses",
    "clipkit.model": "clipkit.models.clip",
    "clipkit.order": "clipkit.data.sample_order",
    "clipkit.orientation": "clipkit.data.orientation",
    "clipkit.pack": "clipkit.data.pack",
    "clipkit.pictograms": "clipkit.data.pictograms",
    "clipkit.pretrained": "clipkit.models.pretrained",
    "clipkit.processors": "clipkit.convert.processors",
    "clipkit.records": "clipkit.log",
    "clipkit.release": "clipkit.convert.release",
    "clipkit.remote": "clipkit.data.remote",
    "clipkit.saver": "clipkit.async_checkpoint",
    "clipkit.shards": "clipkit.data.shards",
    "clipkit.sources": "clipkit.data.sources",
    "clipkit.stream": "clipkit.data.loader",
    "clipkit.tables": "clipkit.data.tables",
    "clipkit.tokenizer": "clipkit.models.tokenizer",
    "clipkit.towers": "clipkit.models.towers",
    "clipkit.train.average": "clipkit.train.averaging",
    "clipkit.train.pages": "clipkit.malloc",
    "clipkit.train.tune": "clipkit.train.finetune",
    "clipkit.weights": "clipkit.convert.weights",
    "clipkit.words": "clipkit.models.words",
}
"""Former module -> present module."""

NAMES: dict[str, dict[str, str]] = {
    "clipkit.guidance.config": {"Steering": "GuidanceConfig"},
    "clipkit.guidance.guiders": {
        "between": "guidance_interval",
        "contrast": "classifier_free",
        "like": "ilvr",
        "mixed": "compose",
    },
    "clipkit.guidance.networks.noisy_clip": {"Wish": "GuidanceTarget"},
    "clipkit.guidance.pipeline": {"Steering": "GuidanceConfig", "Studio": "Pipeline"},
    "clipkit.train.finetune": {"TuneConfig": "FinetuneConfig", "hold_still": "eval_locked"},
    "clipkit.models.tokenizer": {"ForeignTokenizer": "ExternalTokenizer"},
}
"""Present module -> former name -> present name."""


def former_name(module: str, name: str) -> Any:
    """The present object of a former name in a module of the same name: that module's `__getattr__`, which warns."""
    present = NAMES.get(module, {}).get(name)
    if present is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {present}", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(module), present)


class _Former:
    """A module whose attributes are those of the present one."""

    def __init__(self, present: str) -> None:
        self.present = present

    def create_module(self, spec: ModuleSpec) -> None:
        """The default module object."""

    def exec_module(self, module: ModuleType) -> None:
        """Forward attributes to the present module."""
        warnings.warn(f"{module.__name__} is now {self.present}", DeprecationWarning, stacklevel=2)
        present, names = importlib.import_module(self.present), NAMES.get(self.present, {})

        def attribute(name: str) -> Any:
            return getattr(present, names.get(name, name))

        module.__dict__["__getattr__"] = attribute


class Finder:
    """Finds former modules; Python asks it last, when nothing else has a module of that name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A spec for a former module, None for any other."""
        return ModuleSpec(name, _Former(MODULES[name])) if name in MODULES else None  # type: ignore[arg-type]
