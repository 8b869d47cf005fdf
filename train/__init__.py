"""Training: one loop, its optimizer and schedule, and a script with a recipe for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "clipkit.train":
    raise ImportError("import clipkit.train, not train: a module has one name")

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.config import Recipe
    from clipkit.data.loader import Batch, Stream
    from clipkit.train.launch import train_recipe
    from clipkit.train.loop import train
    from clipkit.train.losses import LossConfig, info_nce, sigmoid_loss
    from clipkit.train.optim import make_optimizer
    from clipkit.train.pretrain import Pretraining, PretrainRecipe
    from clipkit.train.step import Task, backward

__all__ = [
    "Batch",
    "LossConfig",
    "PretrainRecipe",
    "Pretraining",
    "Recipe",
    "Stream",
    "Task",
    "backward",
    "info_nce",
    "make_optimizer",
    "sigmoid_loss",
    "train",
    "train_recipe",
]
_HOMES = {
    "clipkit.config": ["Recipe"],
    "clipkit.data.loader": ["Batch", "Stream"],
    "clipkit.train.launch": ["train_recipe"],
    "clipkit.train.loop": ["train"],
    "clipkit.train.losses": ["LossConfig", "info_nce", "sigmoid_loss"],
    "clipkit.train.optim": ["make_optimizer"],
    "clipkit.train.pretrain": ["PretrainRecipe", "Pretraining"],
    "clipkit.train.step": ["Task", "backward"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
