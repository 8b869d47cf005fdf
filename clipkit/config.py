"""Recipes: TOML files that fill typed, frozen dataclasses; overrides are `section.key=value` words after them.

A recipe is data, never code. Every key is known and has a type; a wrong one is refused with a suggestion.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from clipkit.errors import RecipeError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

R = TypeVar("R")

SHIPPED = Path(__file__).resolve().parent / "train" / "recipes"


Unbounded = Annotated[float, "may be infinite"]
"""A recipe's number that may be inf; every other one is refused when it is."""

_LARGEST = 2**63 - 1
"""Largest integer of TOML, torch and numpy."""

_LONGEST = 1e6
"""Minutes, some two years: beyond what they are counted in overflows."""

SMALLEST_SHARE = 1e-3
"""Smallest share of a pack among several; order.py keeps shares in blocks of its inverse."""

_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "above 0": lambda x: x > 0,
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "even and at least 2": lambda x: x >= 2 and x % 2 == 0,
}


def require(bound: str, section: str, config: object, *names: str) -> None:
    """Check values of a recipe's section; NaN is in no range. Raises RecipeError naming key, value and bound."""
    for name in names:
        if not _BOUNDS[bound](value := getattr(config, name)):
            raise RecipeError(f"{section}.{name} is {value}; it must be {bound}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    out: str
    """Folder of the run; the same command resumes what it finds there."""
    steps: int
    """Optimizer steps in all. A run may be resumed with more, or with fewer if it has not come that far: what depends
    on this number, such as the learning rate, is from then on that of the new one."""
    batch_size: int = 256
    """Samples per step over all ranks."""
    micro_batches: int = 1
    """Parts in which each rank computes its share of a batch, to save memory; the gradient is that of the whole, but
    for BatchNorm, which normalises each part by itself: a run that has some says so."""
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
    save_minutes: Unbounded = 30.0
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
    sync_batchnorm: bool = True
    """BatchNorm over the batch of all ranks, so that it is that of one process; false is faster and lets each rank use
    the statistics of its own samples."""
    grad_clip: Unbounded = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the [track] extra)."""

    def __post_init__(self) -> None:
        if not self.out:
            raise RecipeError("run.out is empty; give the run a folder")
        require(
            "at least 1", "run", self, "steps", "batch_size", "micro_batches", "log_every", "save_every", "keep_last"
        )
        require("at least 0", "run", self, "seed", "save_minutes", "keep_every", "eval_every", "grad_clip")
        require("above 0", "run", self, "timeout_minutes")
        require("in [0, 1)", "run", self, "ema_decay")
        if self.timeout_minutes > _LONGEST:
            raise RecipeError(f"run.timeout_minutes is {self.timeout_minutes:g}; it must be at most {_LONGEST:g}")
        if self.micro_batches > self.batch_size:
            raise RecipeError(
                f"run.micro_batches is {self.micro_batches}, more than the {self.batch_size} samples of run.batch_size"
            )


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
        require("in (0, 1]", "data", self, "crop_scale")
        require("in [0, 1]", "data", self, "enlarge", "colour_jitter", "sharpness_jitter", "max_bad_fraction")
        require("at least 0", "data", self, "workers", "window", "cache_gb")
        rest = 1 - sum(self.mix.values())
        if self.mix and not (min(*self.mix.values(), rest) >= SMALLEST_SHARE - 1e-9):
            raise RecipeError(
                f"data.mix is {self.mix}; its shares must be at least {SMALLEST_SHARE:g} each, and leave some of 1 to "
                "data.shards"
            )


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
        require("above 0", "optim", self, "lr")
        require("at least 0", "optim", self, "warmup", "weight_decay")
        require("in (0, 1]", "optim", self, "decay_share")
        require("in [0, 1]", "optim", self, "final_lr")
        require("in [0, 1)", "optim", self, "beta1", "beta2")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sections that every recipe has; each training script adds its model's."""

    run: RunConfig
    data: DataConfig
    optim: OptimConfig

    @classmethod
    def complete(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The recipe's plain data with the values that depend on other files; a task's recipe may add some."""
        return data


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
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise RecipeError(f"{file} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(data, override)
    complete = getattr(kind, "complete", dict)
    return from_dict(kind, complete(data))


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or len(path) < 2 or not all(path):
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except ValueError:
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
    hints = typing.get_type_hints(kind, include_extras=True)
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
        return {k: _coerce(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:  # arguments of others' constructors; they are held to the same numbers
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                _coerce(Any, inner, f"{where}.{key}")
        return _finite(value, where)
    if origin is Annotated:
        return value if value == math.inf else _coerce(arguments[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(_finite(value, where))
    plain = origin or hint
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r} ({type(value).__name__}); it must be of type {_name(hint)}")
    return _finite(value, where)


def _finite(value: Any, where: str) -> Any:
    """The value, unless it is a number that is none, or too large to compute with. Raises RecipeError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} is {value}; it must be a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise RecipeError(f"{where} is a number beyond 64 bits; it must be between -2^63 and 2^63")
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
    if value == math.inf:
        return "inf"
    return json.dumps(value)  # strings, booleans, ints and finite floats are written alike in JSON and TOML
