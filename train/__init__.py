"""Training: one loop, its optimizer and schedule, and a module for each trainable task.

Importing this package is light; its names are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "clipkit.train":
    raise ImportError("import clipkit.train, not train: a module has one name")

if TYPE_CHECKING:
    from clipkit.config import Recipe, load_recipe
    from clipkit.train.averaging import average
    from clipkit.train.denoiser import DenoiserRecipe, Denoising
    from clipkit.train.launch import TaskSpec, train_recipe
    from clipkit.train.loop import train
    from clipkit.train.losses import LossConfig, info_nce, sigmoid_loss
    from clipkit.train.noisy_clip import NoisyCLIPRecipe, NoisyPretraining
    from clipkit.train.optim import make_optimizer
    from clipkit.train.pretrain import Pretraining, PretrainRecipe
    from clipkit.train.step import backward
    from clipkit.train.task import Task

_HOMES = {
    "DenoiserRecipe": "clipkit.train.denoiser",
    "Denoising": "clipkit.train.denoiser",
    "LossConfig": "clipkit.train.losses",
    "NoisyCLIPRecipe": "clipkit.train.noisy_clip",
    "NoisyPretraining": "clipkit.train.noisy_clip",
    "PretrainRecipe": "clipkit.train.pretrain",
    "Pretraining": "clipkit.train.pretrain",
    "Recipe": "clipkit.config",
    "Task": "clipkit.train.task",
    "TaskSpec": "clipkit.train.launch",
    "average": "clipkit.train.averaging",
    "backward": "clipkit.train.step",
    "info_nce": "clipkit.train.losses",
    "load_recipe": "clipkit.config",
    "make_optimizer": "clipkit.train.optim",
    "sigmoid_loss": "clipkit.train.losses",
    "train": "clipkit.train.loop",
    "train_recipe": "clipkit.train.launch",
}

__all__ = [
    "DenoiserRecipe",
    "Denoising",
    "LossConfig",
    "NoisyCLIPRecipe",
    "NoisyPretraining",
    "PretrainRecipe",
    "Pretraining",
    "Recipe",
    "Task",
    "TaskSpec",
    "average",
    "backward",
    "info_nce",
    "load_recipe",
    "make_optimizer",
    "sigmoid_loss",
    "train",
    "train_recipe",
]


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit.train' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
