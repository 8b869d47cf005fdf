"""Start of a training run: recipe, process group, pack, task, data loader; and the entries of the task registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from clipkit import distributed
from clipkit.config import Recipe, RunConfig, load_recipe, to_toml
from clipkit.data.loader import Stream, cache_of, validation_of
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError
from clipkit.inputs import check_writable
from clipkit.log import remark
from clipkit.train import progressive
from clipkit.train.loop import seed_everything, train
from clipkit.train.task import Task

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class TaskSpec(Generic[R]):
    """An entry of `clipkit.registry.TASKS`: recipe class, task and loader."""

    recipe: type[R]
    """Dataclass of the recipe."""
    task: Callable[[R, Shards], Task]
    """Builds the task from a recipe and the recipe's pack."""
    load: Callable[[str | Path], Any]
    """Loads the trained model from the folder of a run, on the CPU or where it can compute."""

    def run(self, path: str | Path, overrides: Sequence[str] = (), dry_run: bool = False) -> Path | None:
        """Load the recipe at `path` and train it -> the run's folder; with `dry_run` only print it, resolved.

        Under torchrun every rank calls this. Raises UsageError for a `run.out` that cannot be written.
        """
        recipe = load_recipe(self.recipe, path, overrides)
        if dry_run:
            print(to_toml(recipe), end="")
            return None
        if os.environ.get("RANK", "0") == "0":  # the others wait for it in the group
            check_writable(Path(recipe.run.out))
        device = distributed.choose_device(recipe.run.device)
        with distributed.process_group(device, recipe.run.timeout_minutes):
            return train_recipe(recipe, self.task, device)


def train_recipe(recipe: R, make_task: Callable[[R, Shards], Task], device: torch.device) -> Path:
    """Open the pack, build the task and its stream, train -> the run's folder.

    Raises RecipeError for a batch that does not divide over the ranks, ShardError for a `data.val` that is no pack.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    _check_batch(recipe.run, world_size)
    shards = Shards(recipe.data.shards, verify=False, cache=cache_of(recipe.data))  # hashed while training
    seed_everything(recipe.run.seed, 0, 0)  # the same initial weights on every rank
    task = make_task(recipe, shards)
    validation_of(recipe.data)  # so that a missing one is found now, not after the last step
    run = recipe.run
    if recipe.data.progressive_size and not task.progressive:
        raise RecipeError(f"data.progressive_size: the images of a {task.kind} have one size; omit it")
    first = progressive.first_size(recipe, task.image_size)
    stream = Stream(
        shards, recipe.data, task.image_size, run.batch_size, run.seed, rank, world_size, *first, task.tokenizers
    )
    if stream.not_indexed:
        remark(f"clipkit: not taken into the index: {', '.join(f'{n} {why}' for why, n in stream.not_indexed.items())}")
    return train(task, stream, recipe, device)


def _check_batch(run: RunConfig, ranks: int) -> None:
    share, rest = divmod(run.batch_size, ranks)
    if rest:
        raise RecipeError(f"run.batch_size is {run.batch_size}; it must be a multiple of the {ranks} ranks")
    if run.micro_batches > share:
        raise RecipeError(
            f"run.micro_batches is {run.micro_batches}, more than the {share} samples that each of {ranks} ranks has"
        )
