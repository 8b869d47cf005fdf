"""Recipes: TOML files that fill typed, frozen dataclasses; overrides are `section.key=value` words after them.

A recipe is data, never code. Every key is known and has a type; a wrong one is refused with a suggestion.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from clipkit.errors import RecipeError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

R = TypeVar("R")

SHIPPED = Path(__file__).resolve().parent / "train" / "recipes"
if not SHIPPED.is_dir():  # a source checkout
    SHIPPED = Path(__file__).resolve().parent.parent / "train" / "recipes"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    out: str
    """Folder of the run; the same command resumes what it finds there."""
    steps: int
    """Optimizer steps in all."""
    batch_size: int = 256
    """Samples per step over all ranks."""
    micro_batches: int = 1
    """Parts in which each rank computes its share of a batch, to save memory; the gradient is that of the whole."""
    seed: int = 0
    """Decides the initial weights, the order of the data and all noise."""
    device: str = "auto"
    """"auto" takes cuda, then mps, then cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """"auto" autocasts to bf16 where the hardware computes in it."""
    log_every: int = 20
    """Steps between log lines."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved, and the one at which SIGTERM or Ctrl-C comes."""
    save_minutes: float = 30.0
    """Minutes after which a checkpoint is due whatever the step."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average, which is what evaluation and `clipkit.load` use."""
    compile: bool = False
    """Compile the networks with torch.compile; needs a C++ compiler on CPUs, and minutes before the first step."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each rank holds of the model: "ddp" all of it, "fsdp" its share (FSDP2)."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before it gives up."""
    sync_batchnorm: bool = False
    """BatchNorm over the batch of all ranks (GPUs only); without it each rank, and each micro-batch, uses its own."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the [track] extra)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise RecipeError(f"run.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("save_minutes", "keep_every", "eval_every"):
            if getattr(self, name) < 0:
                raise RecipeError(f"run.{name} is {getattr(self, name)}; it must be at least 0")
        if self.timeout_minutes <= 0:
            raise RecipeError(f"run.timeout_minutes is {self.timeout_minutes}; it must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise RecipeError(f"run.ema_decay is {self.ema_decay}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are varied."""

    shards: str
    """Folder made by `clipkit pack`, or the http(s) or fsspec (s3://, gs://) URL of one."""
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further packs: folder -> its share of the samples; `shards` has what they leave."""
    val: str = ""
    """Packed validation set, or none."""
    workers: int = 1
    """Loader processes per rank; the order of the data does not depend on it."""
    crop_scale: float = 1.0
    """Smallest share of the area kept by the random resized crop; 1 turns it off."""
    enlarge: float = 0.0
    """Share of the crops smaller than image_size that are enlarged to it; of a picture that is large enough, the others
    become windows of that size. At 1 all are, as by torchvision's RandomResizedCrop."""
    flip: bool = False
    """Flip half of the images left to right."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by 1 - this to 1 + this."""
    sharpness_jitter: float = 0.0
    """Sharpness is scaled by 1 - this to 1 + this: programs that resize pictures differ in it."""
    window: int = 0
    """Shards whose samples are shuffled together; 0 takes all of a folder, and 16 at a time behind a URL."""
    cache: str = "~/.cache/clipkit"
    """Folder for shards fetched from a URL."""
    cache_gb: float = 100.0
    """GiB of fetched shards to keep; two windows must fit."""
    max_bad_fraction: float = 0.01
    """Share of unreadable samples at which the run stops; below it they are skipped, counted and reported."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise RecipeError(f"data.crop_scale is {self.crop_scale}; it must be in (0, 1]")
        for name in ("enlarge", "colour_jitter", "sharpness_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"data.{name} is {getattr(self, name)}; it must be in [0, 1]")
        for name in ("workers", "window", "cache_gb"):
            if getattr(self, name) < 0:
                raise RecipeError(f"data.{name} is {getattr(self, name)}; it must be at least 0")
        if any(share <= 0 for share in self.mix.values()) or sum(self.mix.values()) >= 1:
            raise RecipeError(f"data.mix is {self.mix}; its shares must be above 0, and leave some of 1 to data.shards")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024), with linear warm-up and a schedule."""

    method: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the updates of hidden matrices and convolutions; AdamW keeps the rest, at the same rate."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """How the rate goes on after the warm-up; "wsd" stays at the peak and falls in a straight line at the end."""
    decay_share: float = 0.2
    """Share of all steps in which "wsd" falls."""
    final_lr: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.05
    """Applied to matrices and convolutions only: not to biases, norms, embeddings or the logit scale."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""

    def __post_init__(self) -> None:
        if not 0 < self.decay_share <= 1:
            raise RecipeError(f"optim.decay_share is {self.decay_share}; it must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sections that every recipe has; each training script adds its model's."""

    run: RunConfig
    data: DataConfig
    optim: OptimConfig


def load_recipe(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read the recipe at `path` (or the shipped one of that name), apply the overrides, check everything.

    Raises RecipeError naming the key, what was found and what would have been right.
    """
    file = Path(path)
    if not file.is_file() and (SHIPPED / f"{file.stem}.toml").is_file() and file.parent == Path("."):
        file = SHIPPED / f"{file.stem}.toml"
    if not file.is_file():
        shipped = sorted(p.stem for p in SHIPPED.glob("*.toml"))
        raise RecipeError(f"no recipe at {path}; give a TOML file or a shipped recipe ({', '.join(shipped)})")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(data, override)
    return from_dict(kind, data)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or len(path) < 2 or not all(path):
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, as on any command line
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override {override!r}: {part!r} is a value, not a section")
    data[path[-1]] = value


def from_dict(kind: type[R], data: Mapping[str, Any], where: str = "") -> R:
    """Build the dataclass `kind` from plain data, refusing unknown keys, wrong types and missing values."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where.rstrip('.')} is {data!r}; it must be a section")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in fields:
            raise RecipeError(f"unknown recipe key {where}{key}; {did_you_mean(key, fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in data:
            values[name] = _coerce(hints[name], data[name], f"{where}{name}")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = from_dict(typing.cast(type[Any], hints[name]), {}, f"{where}{name}.")
        elif required:
            raise RecipeError(f"recipe key {where}{name} is missing")
    return kind(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where} is {value!r}; {did_you_mean(str(value), map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        chosen = next(a for a in arguments if a is not type(None))
        return None if value is None else _coerce(chosen, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r} ({type(value).__name__}); it must be of type {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    return "list" if typing.get_origin(hint) is tuple else getattr(hint, "__name__", str(hint))


def to_toml(recipe: Any) -> str:
    """The resolved recipe as TOML, every key written out; `from_dict` of it gives the same recipe."""
    lines: list[str] = []

    def emit(value: Mapping[str, Any], prefix: str) -> None:
        plain = {k: v for k, v in value.items() if not (isinstance(v, dict) and prefix == "")}
        lines.extend(f"{k} = {_toml_value(v)}" for k, v in plain.items() if v is not None)
        for key, section in value.items():
            if key not in plain:
                lines.append(f"\n[{key}]")
                emit(section, f"{key}.")

    emit(dataclasses.asdict(recipe), "")
    return "\n".join(lines).strip() + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value)  # strings, booleans, ints and floats are written alike in JSON and TOML
