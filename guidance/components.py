"""Finds the networks that belong to a denoiser's run: noise-aware CLIP, clean CLIP and autoencoder (VAE).

They are looked for beside the run, and at the paths of its recipe. A run records the identity of each network that it
was trained with (`TRAINED_WITH`), since latents of another autoencoder decode to noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit import distributed
from clipkit.checkpoint import Checkpoint
from clipkit.convert import hub
from clipkit.errors import CheckpointError
from clipkit.guidance.denoiser import Denoiser
from clipkit.guidance.loading import Guide, denoiser_of, guide_of, load_autoencoder
from clipkit.guidance.networks.autoencoder import Autoencoder, is_diffusers
from clipkit.io import read_object
from clipkit.log import say
from clipkit.models.pretrained import TRAINED_WITH, Pretrained, identity, load
from clipkit.models.source import find, folder_of, is_external


@dataclass(frozen=True)
class Parts:
    """The networks of a pipeline: no guide if a conditional denoiser has none, no autoencoder for pixels."""

    denoiser: Denoiser
    guide: Guide | None
    clip: Pretrained
    autoencoder: Autoencoder | None


def load_parts(path: str | Path, device: str = "auto") -> Parts:
    """A denoiser's run, or the one in the folder `path`, with the networks that it draws with, on `device`.

    A noise-aware CLIP is beside the run; the clean CLIP and the autoencoder are beside it, or at its recipe's paths.

    Raises CheckpointError for a missing network, for an autoencoder that is not the one of the training, and for a
    noise-aware CLIP that does not fit; a conditional denoiser omits it with a message.
    """
    where, found = distributed.choose_device(device), find(path, "denoiser")
    denoiser = denoiser_of(found)
    autoencoder = _autoencoder(path, found, denoiser) if denoiser.latent_channels else None
    guide, clips = _guide(path, found, denoiser, autoencoder), [(found, "condition.clip")]
    if guide is not None:
        clips.append((guide[1], "model.clip"))
        guide[0].model.to(where)
    clip = _clip(path, device, clips)
    if _trained_with(found).get("condition.clip") not in (None, identity(clip.model.text)):
        say(
            f"the CLIP beside {_run(found)} is another than {_recorded(found, 'condition.clip')}, which it was trained "
            "with: captions are read as in training, scores are the other CLIP's"
        )
    return Parts(
        denoiser.to(where),
        None if guide is None else guide[0],
        clip,
        None if autoencoder is None else autoencoder.to(where),
    )


def load_guide_and_clip(path: str | Path, device: str = "auto") -> tuple[Guide, Pretrained]:
    """A noisy_clip run, or the one in the folder `path`, and the clean CLIP beside it or at its recipe's path."""
    found = find(path, "noisy_clip")
    guide = guide_of(found)
    guide.model.to(distributed.choose_device(device))
    return guide, _clip(path, device, [(found, "model.clip")])


def _autoencoder(path: str | Path, found: Checkpoint, denoiser: Denoiser) -> Autoencoder:
    """The autoencoder whose latents the denoiser was trained on, if its checkpoint records the identity."""
    key = "latent.autoencoder"
    places, wanted = _places(path, found, key), _trained_with(found).get(key)
    others: list[str] = []
    for place in _all_at(places, "autoencoder"):
        model = load_autoencoder(place)
        is_it = identity(model)
        if wanted in (None, is_it):
            break
        others.append(f"{place} ({is_it})")
    else:
        if not others:
            raise _missing(found, "the autoencoder of its latents", places)
        raise CheckpointError(
            f"{_run(found)} was trained on latents of {_recorded(found, key)} ({wanted}), and {' and '.join(others)} "
            "is another autoencoder; put that of the training there, or train the denoiser again"
        )
    made, needed = (
        f"{n} x {size} x {size}"
        for n, size in (
            (model.config.latent_channels, model.config.latent_size),
            (denoiser.latent_channels, denoiser.image_size),
        )
    )
    if made != needed:
        raise CheckpointError(f"{_run(found)} draws latents of {needed}, the autoencoder {place} has those of {made}")
    return model


def _guide(
    path: str | Path, found: Checkpoint, denoiser: Denoiser, autoencoder: Autoencoder | None
) -> tuple[Guide, Checkpoint] | None:
    """The noise-aware CLIP beside a denoiser, with its checkpoint."""
    places, needed = _places(path, found), denoiser.conditioner is None
    lying = _all_at(places, "noisy_clip")
    if not lying:
        if needed:
            raise _missing(found, "a noise-aware CLIP, as it was trained without descriptions", places)
        return None
    there = find(lying[0], "noisy_clip")
    guide = guide_of(there)
    if (misfit := _misfit(guide, there, denoiser, autoencoder)) is None:
        return guide, there
    if needed:
        raise CheckpointError(misfit)
    say(f"{misfit}; it is omitted")
    return None


def _misfit(guide: Guide, there: Checkpoint, denoiser: Denoiser, autoencoder: Autoencoder | None) -> str | None:
    """The reason why a noise-aware CLIP cannot guide a denoiser, or None."""
    name, shape = f"the noise-aware CLIP {_run(there)}", guide.model.clip.config
    recorded, channels = _recorded(there, "model.autoencoder"), len(shape.conventions.image_mean)
    if channels != denoiser.channels or bool(recorded) != bool(denoiser.latent_channels):
        kinds = ("latents" if latent else "pixels" for latent in (recorded, denoiser.latent_channels))
        return (
            f"{name} sees {channels} channels of {next(kinds)}, the denoiser {denoiser.channels} of {next(kinds)}; "
            "train it with model.autoencoder as the denoiser's latent.autoencoder"
        )
    if shape.image_size != denoiser.image_size:
        return f"{name} sees {shape.image_size} pixels, the denoiser draws {denoiser.image_size}; train it with " + (
            "the denoiser's autoencoder" if recorded else f"model.image_size={denoiser.image_size}"
        )
    wanted = _trained_with(there).get("model.autoencoder")
    if autoencoder is not None and wanted not in (None, is_it := identity(autoencoder)):
        return (
            f"{name} was trained on latents of {recorded} ({wanted}), and the denoiser's autoencoder is another one "
            f"({is_it}); train it with the denoiser's"
        )
    return None


def _clip(path: str | Path, device: str, runs: Sequence[tuple[Checkpoint, str]]) -> Pretrained:
    """The clean CLIP beside the first of some runs, or at the path of a recipe's key."""
    themselves = [Path(os.path.abspath(_run(found))) for found, _ in runs]
    every = dict.fromkeys(place for found, key in runs for place in _places(path, found, key))
    places = [place for place in every if place not in themselves]
    published = (name for name in (_recorded(found, key) for found, key in runs) if hub.find(name) is not None)
    names: list[str | Path] = [*_all_at(places, "clip"), *published]
    if names:
        return load(names[0], device)
    raise _missing(runs[0][0], "a CLIP that scores its pictures", places)


def _places(path: str | Path, found: Checkpoint, key: str = "") -> list[Path]:
    """Where a network of a run is looked for: the folder given, beside the run, at the path of a recipe's key.

    That path is tried relative to the run, which may have moved together with the network, and as it is written.
    """
    run = os.path.abspath(_run(found))
    places = [folder_of(path), Path(run).parent]
    if recorded := _recorded(found, key):
        places += [Path(run, os.path.relpath(recorded, found.state["recipe"]["run"]["out"])), folder_of(recorded)]
    absolute = [os.path.abspath(place) for place in places]
    return [Path(place) for place in dict.fromkeys(absolute) if place != run]


def _all_at(places: Sequence[Path], kind: str) -> list[Path]:
    """The places, or folders in them named after the kind, that hold a run or an external model."""

    def is_one(folder: Path) -> bool:
        external = (kind == "clip" and is_external(folder)) or (kind == "autoencoder" and is_diffusers(folder))
        return external or any(_kind(step) in (kind, None) for step in (folder / "checkpoints").glob("step-*"))

    return [folder for place in places for folder in (place, place / kind) if is_one(folder)]


def _kind(step: Path) -> str | None:
    """The kind of a checkpoint's run; None for a damaged one, which loading reports."""
    try:
        return str(read_object(step / "state.json").get("kind"))
    except CheckpointError:
        return None


def _missing(found: Checkpoint, what: str, places: Sequence[Path]) -> CheckpointError:
    return CheckpointError(f"{_run(found)} needs {what}; there is none in {', '.join(map(str, places))}")


def _run(found: Checkpoint) -> Path:
    return found.path.parents[1]


def _recorded(found: Checkpoint, key: str) -> str:
    """The value of a recipe's key "section.name"; empty without the section."""
    section, _, name = key.partition(".")
    return str((found.state["recipe"].get(section) or {}).get(name, ""))


def _trained_with(found: Checkpoint) -> dict[str, str]:
    """Recipe key -> identity of the network that the training used; empty for older runs."""
    return dict(json.loads(found.text(TRAINED_WITH, default="{}")))
