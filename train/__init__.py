"""Training: one loop, its optimizer and schedule, and a module for each trainable task.

Importing this package is light; its names are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "clipkit.train":
    raise ImportError("import clipkit.train, not train: a module has one name")

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.config import Recipe, load_recipe
    from clipkit.data.loader import Batch, Stream
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

__all__ = [
    "Batch",
    "DenoiserRecipe",
    "Denoising",
    "LossConfig",
    "NoisyCLIPRecipe",
    "NoisyPretraining",
    "PretrainRecipe",
    "Pretraining",
    "Recipe",
    "Stream",
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
_HOMES = {
    "clipkit.config": ["Recipe", "load_recipe"],
    "clipkit.data.loader": ["Batch", "Stream"],
    "clipkit.train.averaging": ["average"],
    "clipkit.train.denoiser": ["DenoiserRecipe", "Denoising"],
    "clipkit.train.launch": ["TaskSpec", "train_recipe"],
    "clipkit.train.loop": ["train"],
    "clipkit.train.losses": ["LossConfig", "info_nce", "sigmoid_loss"],
    "clipkit.train.noisy_clip": ["NoisyCLIPRecipe", "NoisyPretraining"],
    "clipkit.train.optim": ["make_optimizer"],
    "clipkit.train.pretrain": ["PretrainRecipe", "Pretraining"],
    "clipkit.train.step": ["backward"],
    "clipkit.train.task": ["Task"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
