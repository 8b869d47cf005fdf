"""Modules and names of version 0.1: importing one warns, and gives what it is called now. They go with version 0.3."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
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
    "clipkit.convert.export": {"FORMATS": "clipkit.registry:EXPORT_FORMATS"},
    "clipkit.convert.processors": {
        "CLIP_VOCABULARY": "clipkit.convert.tokenizer_files:CLIP_VOCABULARY",
        "TokenizerFiles": "clipkit.convert.tokenizer_files:TokenizerFiles",
        "padding": "clipkit.convert.tokenizer_files:padding",
        "read_tokenizer": "clipkit.convert.tokenizer_files:read_tokenizer",
        "siglip_cleaning": "clipkit.convert.tokenizer_files:siglip_cleaning",
        "write_tokenizer": "clipkit.convert.tokenizer_files:write_tokenizer",
    },
    "clipkit.convert.release": {"KINDS": "clipkit.registry:TASKS"},
    "clipkit.convert.weights": {
        "RESNETS": "clipkit.convert.open_clip:RESNETS",
        "SIGLIP": "clipkit.convert.transformers:SIGLIP",
        "VIT": "clipkit.convert.open_clip:VIT",
    },
    "clipkit.data.shards": {
        "FORMAT": "clipkit.data.manifest:FORMAT",
        "KEYS": "clipkit.data.manifest:KEYS",
        "MAX_CAPTION": "clipkit.data.captions:MAX_CAPTION",
        "PICKLES": "clipkit.data.tar_scan:PICKLES",
        "Scan": "clipkit.data.tar_scan:Scan",
        "StrictTarInfo": "clipkit.data.tar_scan:StrictTarInfo",
        "check_count": "clipkit.data.manifest:check_count",
        "check_end": "clipkit.data.tar_scan:check_end",
        "clean_caption": "clipkit.data.captions:clean_caption",
        "find_index": "clipkit.data.manifest:find_manifest",
        "index_shard": "clipkit.data.manifest:index_shard",
        "is_hidden": "clipkit.data.tar_scan:is_hidden",
        "load_index": "clipkit.data.manifest:load_manifest",
        "scan": "clipkit.data.tar_scan:scan",
        "split_key": "clipkit.data.tar_scan:split_key",
        "tar_files": "clipkit.data.manifest:tar_files",
        "tars_of": "clipkit.data.manifest:tars_of",
        "unlisted": "clipkit.data.manifest:unlisted",
        "write_index": "clipkit.data.manifest:index_folder",
    },
    "clipkit.distributed": {"meet": "all_reduce_max"},
    "clipkit.guidance.config": {"Steering": "GuidanceConfig"},
    "clipkit.guidance.guiders": {
        "between": "guidance_interval",
        "contrast": "classifier_free",
        "like": "ilvr",
        "mixed": "compose",
    },
    "clipkit.guidance.networks.condition": {"words_of": "clipkit.models.words:words_of"},
    "clipkit.guidance.networks.noisy_clip": {"Wish": "GuidanceTarget"},
    "clipkit.guidance.pipeline": {
        "SPACINGS": "clipkit.registry:SPACINGS",
        "Steering": "GuidanceConfig",
        "Studio": "Pipeline",
        "alternatives": "clipkit.guidance.targets:alternatives",
    },
    "clipkit.log": {
        "only_known": "clipkit.io:only_known",
        "read_object": "clipkit.io:read_object",
        "sha256": "clipkit.io:sha256",
        "write_atomically": "clipkit.io:write_atomically",
        "written_whole": "clipkit.io:written_whole",
    },
    "clipkit.models.pretrained": {
        "find": "clipkit.models.source:find",
        "folder_of": "clipkit.models.source:folder_of",
        "is_foreign": "clipkit.models.source:is_external",
    },
    "clipkit.models.tokenizer": {"ForeignTokenizer": "ExternalTokenizer"},
    "clipkit.models.towers": {"OURS": "clipkit.registry:TOWERS"},
    "clipkit.train.finetune": {"TuneConfig": "FinetuneConfig", "hold_still": "eval_locked"},
    "clipkit.train.optim": {"Muon": "AdamWMuon"},
    "clipkit.train.step": {"Features": "clipkit.train.task:Features"},
    "clipkit.zeroshot.datasets": {"known": "clipkit.zeroshot.named:described"},
}
"""Present module -> former name -> present name, "module:name" where that is in another module than the rest."""


def _present(module: str, name: str) -> Any:
    """The object that a name of version 0.1 stands for in a present module."""
    home, _, attribute = NAMES.get(module, {}).get(name, name).rpartition(":")
    return getattr(importlib.import_module(home or module), attribute)


def former_name(module: str, name: str) -> Any:
    """The present object of a former name in a module of the same name: that module's `__getattr__`, which warns."""
    present = NAMES.get(module, {}).get(name)
    if present is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now {present.replace(':', '.')}", DeprecationWarning, stacklevel=3)
    return _present(module, name)


class _Former:
    """A module whose attributes are those of the present one."""

    def __init__(self, present: str) -> None:
        self.present = present

    def create_module(self, spec: ModuleSpec) -> None:
        """The default module object."""

    def exec_module(self, module: ModuleType) -> None:
        """Forward attributes to the present module."""
        warnings.warn(f"{module.__name__} is now {self.present}", DeprecationWarning, stacklevel=2)
        importlib.import_module(self.present)
        module.__dict__["__getattr__"] = partial(_present, self.present)


class Finder:
    """Finds former modules; Python asks it last, when nothing else has a module of that name."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """A spec for a former module, None for any other."""
        return ModuleSpec(name, _Former(MODULES[name])) if name in MODULES else None  # type: ignore[arg-type]
