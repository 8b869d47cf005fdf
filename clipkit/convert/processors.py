"""Image preprocessing of published models: preprocess_cfg of open_clip, preprocessor_config.json of transformers.

Both become compatibility switches (`Conventions`), and both are written from them. A step that clipkit does not have is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import CheckpointError, shown
from clipkit.io import only_known, read_object
from clipkit.models.clip import Conventions


def square(value: Any, where: str) -> Any:
    """A side that may be given as two equal ones. Raises CheckpointError for a rectangle."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) not in (1, 2) or value[0] != value[-1]:
        raise CheckpointError(f"{where} is {list(value)}; clipkit has square images only")
    return value[0]


def _three(value: Any, where: str) -> tuple[float, ...]:
    """One number for each channel."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise CheckpointError(f"{where} is {shown(repr(value))}; it must be a number for each of three channels")
    return tuple(float(n) for n in numbers)


def _statistics(mean: Any, std: Any, where: str) -> dict[str, Any]:
    found = {"image_mean": _three(mean, f"{where}mean"), "image_std": _three(std, f"{where}std")}
    if min(found["image_std"]) <= 0:
        raise CheckpointError(f"{where}std is {found['image_std']}; it must be above 0")
    return found


def known(value: Any, table: Mapping[Any, str], where: str) -> str:
    """Our name for a value of theirs. Raises CheckpointError for values that are not in the table."""
    if value not in table:
        raise CheckpointError(f"{where} {value!r} is not supported; known: {', '.join(map(str, table))}")
    return table[value]


# open_clip

_RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}
"""open_clip's names for the ways to make a picture square -> ours."""


def open_clip_pictures(preprocess_cfg: object) -> dict[str, Any]:
    """The switches that open_clip's preprocess_cfg asks for; keys that it omits have open_clip's defaults."""
    if isinstance(preprocess_cfg, Mapping):
        preprocess_cfg = {key: value for key, value in preprocess_cfg.items() if value is not None}
    how = only_known(
        preprocess_cfg,
        "preprocess_cfg",
        {"mean": None, "std": None, "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0},
        {"mode": ("RGB",)},
        {"size"},  # open_clip takes the model's
    )
    if how["fill_color"] > 255:
        raise CheckpointError(f"preprocess_cfg.fill_color is {how['fill_color']}; it must be at most 255")
    mean = _OPENAI[0] if how["mean"] is None else how["mean"]
    std = _OPENAI[1] if how["std"] is None else how["std"]
    resize = known(how["resize_mode"], _RESIZE_MODES, "preprocess_cfg.resize_mode")
    return {
        **_statistics(mean, std, "preprocess_cfg."),
        "image_resize": resize,
        "image_fill": how["fill_color"] if resize == "pad" else 0,
        # "random" is for training; open_clip evaluates bicubic then.
        "image_interpolation": known(
            how["interpolation"],
            {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"},
            "preprocess_cfg.interpolation",
        ),
    }


def open_clip_preprocessing(conventions: Conventions) -> dict[str, Any]:
    """preprocess_cfg of a model with these switches."""
    modes = {ours: theirs for theirs, ours in _RESIZE_MODES.items()}
    return {
        "mean": list(conventions.image_mean),
        "std": list(conventions.image_std),
        "interpolation": conventions.image_interpolation,
        "resize_mode": modes[conventions.image_resize],
        "fill_color": conventions.image_fill,
    }


# transformers

_OPENAI = (Conventions.image_mean, Conventions.image_std)
_HALVES = ((0.5,) * 3, (0.5,) * 3)
_RESAMPLINGS = {2: "bilinear", 3: "bicubic"}
_PROCESSORS = {"CLIPImageProcessor": "clip", "CLIPFeatureExtractor": "clip", "SiglipImageProcessor": "siglip"}


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """transformers' settings for pictures, out of the file that counts; None where there is none."""
    whole = folder / "processor_config.json"
    if whole.is_file() and isinstance(found := read_object(whole).get("image_processor"), dict):
        return found
    alone = folder / "preprocessor_config.json"
    return read_object(alone) if alone.is_file() else None


def transformers_pictures(seen: Mapping[str, Any] | None, model_type: str, image_size: int) -> dict[str, Any]:
    """The conventions that transformers' image processor asks for; keys that it omits have the defaults of its class.

    Without any settings they are those of the model's own processor. Raises CheckpointError for steps that are not
    done here, and for sizes that are not the model's.
    """
    if seen is None:
        whole = {"height": image_size, "width": image_size}
        seen = {"size": {"shortest_edge": image_size}, "crop_size": whole} if model_type == "clip" else {"size": whole}
    seen = {key: value for key, value in seen.items() if value is not None}
    where = "preprocessor_config.json: "
    named = str(seen.get("image_processor_type", seen.get("feature_extractor_type", "")))
    kind = known(named.removesuffix("Fast").removesuffix("Pil"), _PROCESSORS, where) if named else model_type
    clip, default = kind == "clip", {"height": 224, "width": 224}
    how = only_known(
        seen,
        where.rstrip(": "),
        {
            "size": None, "crop_size": None, "do_center_crop": clip, "resample": 3, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": None, "image_std": None,
        },
        {"do_resize": (True,), "do_rescale": (True,), "do_pad": (False,), "use_square_size": (False,)},
        _WITHOUT_EFFECT,
    )  # fmt: skip
    if abs(how["rescale_factor"] * 255 - 1) > 1e-4:
        raise CheckpointError(f"{where}rescale_factor {how['rescale_factor']} is not supported; it must be 1/255")
    size = how["size"] if how["size"] is not None else {"shortest_edge": 224} if clip else default
    crop = (how["crop_size"] if how["crop_size"] is not None else default) if how["do_center_crop"] else None
    standard = _OPENAI if clip else _HALVES
    mean, std = (how[key] if how[key] is not None else standard[i] for i, key in enumerate(("image_mean", "image_std")))
    if not how["do_normalize"]:
        mean, std = 0.0, 1.0
    return {
        **_statistics(mean, std, f"{where}image_"),
        "image_resize": _resize(size, crop, image_size, where),
        "image_interpolation": known(how["resample"], _RESAMPLINGS, f"{where}resample"),
    }


# Names, and steps that clipkit does for every picture: RGB, channels first.
_WITHOUT_EFFECT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "device",
    "input_data_format", "return_tensors", "default_to_square", "disable_grouping", "pad_size", "_valid_processor_keys",
    "transformers_version",
}  # fmt: skip


def _resize(size: Any, crop: Any, image_size: int, where: str) -> str:
    """What makes the square: `size` is the resize's, `crop` that of the crop after it, or None."""
    sides = {"shortest_edge": size} if isinstance(size, int) else size
    cut = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    whole = {"height": image_size, "width": image_size}
    if cut in (None, whole) and sides == whole:
        return "squash"
    if cut == whole and sides == {"shortest_edge": image_size}:
        return "crop"
    cropped = "no crop" if crop is None else f"crop_size {shown(crop)}"
    raise CheckpointError(
        f"{where}size {shown(size)} with {cropped} is not supported for a model of {image_size} pixels; supported: "
        f"both sides to {image_size}, or the shortest_edge to {image_size} and its middle"
    )


def transformers_preprocessing(conventions: Conventions, image_size: int, siglip: bool) -> dict[str, Any]:
    """preprocessor_config.json of a CLIP or SigLIP with these switches."""
    square_size = {"height": image_size, "width": image_size}
    crop = conventions.image_resize == "crop"
    resamplings = {ours: theirs for theirs, ours in _RESAMPLINGS.items()}
    return {
        # SigLIP's own processor does not crop.
        "image_processor_type": "SiglipImageProcessor" if siglip and not crop else "CLIPImageProcessor",
        "size": {"shortest_edge": image_size} if crop else square_size,
        "crop_size": square_size,
        "do_center_crop": crop,
        "resample": resamplings[conventions.image_interpolation],
        "image_mean": list(conventions.image_mean),
        "image_std": list(conventions.image_std),
    }
