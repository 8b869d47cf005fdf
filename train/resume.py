"""Whether a run may be resumed: its stored recipe and frozen models against the present ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from clipkit import checkpoint
from clipkit.config import Recipe
from clipkit.errors import CheckpointError
from clipkit.models.pretrained import TRAINED_WITH

FREE_TO_CHANGE = {"data.workers", "data.cache", "data.cache_gb"} | {
    f"run.{key}"
    for key in (
        *("out", "device", "log_every", "save_every", "save_minutes", "keep_last", "keep_every", "eval_every"),
        *("tensorboard", "parallel", "timeout_minutes", "sync_batchnorm", "steps"),
    )
}
"""Keys that may differ when a run is resumed."""


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; an omitted section has no keys."""
    return {f"{section}.{key}": v for section, values in recipe.items() for key, v in (values or {}).items()}


def _filled(stored: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A stored recipe or section, with the defaults of keys that were added since.

    It is only compared with the present recipe, so that its values need not be within the present bounds.
    """
    found = dict(stored)
    for field in dataclasses.fields(config):
        ours = getattr(config, field.name)
        if isinstance(stored.get(field.name), Mapping) and dataclasses.is_dataclass(ours):
            found[field.name] = _filled(stored[field.name], ours)
        elif field.name not in stored and field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.name not in stored and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            found[field.name] = _filled({}, value) if dataclasses.is_dataclass(value) else value
        elif field.name not in stored and dataclasses.is_dataclass(ours):
            found[field.name] = _filled({}, ours)
    return found


def check_recipe(found: checkpoint.Checkpoint, recipe: Recipe) -> list[str]:
    """Refuse to resume with a recipe that differs in what decides the weights -> messages on what changes from here.

    run.steps may differ if the run has not done that many: the learning-rate schedule and data.progressive_size follow
    the new number. Raises CheckpointError naming the keys that differ.
    """
    ours = _flat(json.loads(json.dumps(dataclasses.asdict(recipe))))
    theirs = _flat(json.loads(json.dumps(_filled(found.state["recipe"], recipe))))
    keys = [key for key in {**theirs, **ours} if key not in FREE_TO_CHANGE]
    changed = [
        f"{key}: {_show(theirs.get(key))} there, {_show(ours.get(key))} here"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
    run = found.path.parent.parent
    if changed:
        hint = f"; to fine-tune from it, finetune.init_from={run} and a new run.out"
        raise CheckpointError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}); give run.out another folder, or the recipe "
            f"its old values{hint if 'finetune.init_from' in ours else ''}"
        )
    steps = recipe.run.steps
    before = theirs["run.steps"]
    if steps == before:
        return []
    if steps <= found.step:
        raise CheckpointError(
            f"{run} has done {found.step} of {before} steps; run.steps={steps} must be more than it has done"
        )
    return [f"run.steps: {before} there, {steps} here; from step {found.step} on the schedule is that of {steps} steps"]


def check_models(found: checkpoint.Checkpoint, texts: Mapping[str, str]) -> None:
    """Refuse to resume with other frozen models than the run was trained with. Raises CheckpointError."""
    there, here = (json.loads(text) for text in (found.text(TRAINED_WITH, "{}"), texts.get(TRAINED_WITH, "{}")))
    for key in here:
        if there.get(key, here[key]) != here[key]:
            section, name = key.split(".")
            raise CheckpointError(
                f"{found.path.parent.parent} was trained with another {key}: {found.state['recipe'][section][name]} "
                f"has changed since ({there[key]} then, {here[key]} now); put it back, or give run.out another folder"
            )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
