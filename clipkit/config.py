"""Recipes: TOML files that fill typed, frozen dataclasses; `section.key=value` words override their keys.

A recipe is data, never code. Every key is known and has a type; a wrong one is refused with a suggestion. A key's help
is the docstring of its field (clipkit/reference.py reads it).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from clipkit.errors import RecipeError, did_you_mean
from clipkit.log import remark
from clipkit.registry import Registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

R = TypeVar("R")

SHIPPED = Path(__file__).resolve().parent / "train" / "recipes"

RENAMED = {
    "condition.drop": "condition.dropout",
    "data.enlarge": "data.upscale_crops",
    "data.window": "data.shuffle_window",
    "model.bank": "model.negative_captions",
    "model.early_size": "data.progressive_size",
    "optim.decay_share": "optim.decay_fraction",
    "optim.final_lr": "optim.final_lr_fraction",
    "tune": "finetune",
}
"""Former key or section of recipes -> present one. Recipes, overrides and checkpoints may have either."""

Unbounded = Annotated[float, "may be infinite"]
"""A number of a recipe that may be inf; other numbers may not."""

_LARGEST = 2**63 - 1
"""Largest integer of TOML, torch and numpy."""

_LONGEST = 1e6
"""Minutes, some two years; larger numbers overflow."""

SMALLEST_SHARE = 1e-3
"""Smallest share of a pack among several; data/sample_order.py draws from the packs in blocks of its inverse."""

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
    """The training run: its folder, length, batch, precision, checkpoints and ranks."""

    out: str
    """Folder of the run; the same command resumes the run in it."""
    steps: int
    """Optimizer steps in all. A run may be resumed with more steps, or with fewer if it has not done that many; its
    learning-rate schedule is then that of the new number."""
    batch_size: int = 256
    """Samples per step over all ranks."""
    micro_batches: int = 1
    """Gradient accumulation (GradCache): micro-batches that each rank splits its samples into, to save memory. The
    gradient is that of the whole batch, except that BatchNorm normalises each micro-batch by itself, which the run
    says."""
    seed: int = 0
    """Decides the initial weights, the order of the data and all noise."""
    device: str = "auto"
    """"auto" takes cuda, then mps, then cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Mixed precision: "bf16" autocasts the networks, "auto" does so where the hardware computes in it."""
    log_every: int = 20
    """Steps between log lines."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved, and the one at which SIGTERM or Ctrl-C comes."""
    save_minutes: Unbounded = 30.0
    """Minutes after which a checkpoint is written whatever the step."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of the multiples of this step are never deleted; 0 keeps none of them."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which evaluation and `clipkit.load` use."""
    compile: bool = False
    """Compile the networks with torch.compile; needs a C++ compiler on CPUs, and minutes before the first step."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Data parallel training: "ddp" replicates the model on each rank, "fsdp" shards it over the ranks (FSDP2)."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before it gives up."""
    sync_batchnorm: bool = True
    """BatchNorm over the samples of all ranks, as on one process; false is faster, and each rank normalises its own
    samples."""
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
    """Where the samples come from and how they are augmented."""

    shards: str
    """Folder made by `clipkit pack`, or the http(s) or fsspec (s3://, gs://) URL of one."""
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further packs to mix in: folder -> its share of the samples; the rest comes from `shards`."""
    val: str = ""
    """Pack of the validation set; empty: none."""
    workers: int = 1
    """Loader processes per rank; the order of the data does not depend on it."""
    crop_scale: float = 1.0
    """Smallest fraction of the area that the random resized crop keeps; 1 turns it off."""
    upscale_crops: float = 0.0
    """Fraction of the crops smaller than image_size that are upscaled to it, if the image is large enough for a window
    of that size; the others become such windows. 1 is torchvision's RandomResizedCrop."""
    progressive_size: int = 0
    """Progressive resizing: side of the images in the first three fifths of the steps, which costs less; 0: off. For
    CLIPs whose image tower takes any size (train/progressive.py)."""
    flip: bool = False
    """Flip half of the images left to right."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by 1 - this to 1 + this."""
    sharpness_jitter: float = 0.0
    """Sharpness is scaled by 1 - this to 1 + this, as programs that resize images differ in it."""
    shuffle_window: int = 0
    """Shards whose samples are shuffled together; 0 takes all of a folder, and 16 at a time behind a URL."""
    cache: str = "~/.cache/clipkit"
    """Folder for shards fetched from a URL."""
    cache_gb: float = 100.0
    """GiB of fetched shards to keep; two shuffle windows must fit."""
    max_bad_fraction: float = 0.01
    """Share of unreadable samples at which the run stops; below it they are skipped, counted and reported."""

    def __post_init__(self) -> None:
        require("in (0, 1]", "data", self, "crop_scale")
        require("in [0, 1]", "data", self, "upscale_crops", "colour_jitter", "sharpness_jitter", "max_bad_fraction")
        require("at least 0", "data", self, "workers", "shuffle_window", "cache_gb", "progressive_size")
        rest = 1 - sum(self.mix.values())
        if self.mix and not (min(*self.mix.values(), rest) >= SMALLEST_SHARE - 1e-9):
            raise RecipeError(
                f"data.mix is {self.mix}; its shares must be at least {SMALLEST_SHARE:g} each, and leave some of 1 to "
                "data.shards"
            )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024), with linear warmup and a schedule."""

    method: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the updates of hidden matrices and convolutions; AdamW updates the rest, at the same lr."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warmup."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warmup: cosine decay, "wsd" (the peak, then linear decay at the end), or the
    peak."""
    decay_fraction: float = 0.2
    """Fraction of the steps in which "wsd" decays."""
    final_lr_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: float = 0.05
    """Weight decay of matrices and convolutions; biases, norms, embeddings and the logit scale have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""

    def __post_init__(self) -> None:
        require("above 0", "optim", self, "lr")
        require("at least 0", "optim", self, "warmup", "weight_decay")
        require("in (0, 1]", "optim", self, "decay_fraction")
        require("in [0, 1]", "optim", self, "final_lr_fraction")
        require("in [0, 1)", "optim", self, "beta1", "beta2")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The sections that every recipe has; each task adds its own."""

    run: RunConfig
    data: DataConfig
    optim: OptimConfig

    @classmethod
    def complete(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The recipe's plain data with the values that depend on other files; a task's recipe may add some."""
        return data


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_recipe(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read the recipe at `path` (or the shipped one of that name), apply the overrides, check everything.

    Raises RecipeError naming the key, its value and the values that are valid.
    """
    file = Path(path)
    if not file.is_file() and (SHIPPED / f"{file.stem}.toml").is_file() and file.parent == Path("."):
        file = SHIPPED / f"{file.stem}.toml"
    if not file.is_file():
        raise RecipeError(f"no recipe at {path}; {did_you_mean(file.stem, shipped())}")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise RecipeError(f"{file} is not valid TOML: {error}") from None
    known = {name for key, *_ in keys_of(kind) for name in (key, key.partition(".")[0])}
    data, former = with_present_names(data, known)
    words = [_override(override) for override in overrides]
    for key, value in words:
        old, new = _present_name(key, known)
        if new != key:
            former[old] = RENAMED[old]
            if any(new == other for other, _ in words):
                raise RecipeError(_both(key, new))
        _set(data, new, value)
    for old, new in former.items():
        remark(f"clipkit: {old} is now {new}")
    complete = getattr(kind, "complete", dict)
    return from_dict(kind, complete(data))


def with_present_names(
    recipe: Mapping[str, Any], known: Container[str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe's sections under the present names of `RENAMED` -> a copy, and the former names in it with the present.

    known: keys and sections of the recipe's class; only names among them are given. None: any name is.
    Raises RecipeError for a key under both names.
    """
    found = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in recipe.items()}
    former: dict[str, str] = {}
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        source: Any = found.get(section) if key else found
        if not isinstance(source, dict) or (key or section) not in source or (known is not None and new not in known):
            continue
        value = source.pop(key or section)
        section, _, key = new.partition(".")
        target: Any = found.setdefault(section, {}) if key else found
        if not isinstance(target, dict) or (key or section) in target:
            raise RecipeError(_both(old, new))
        target[key or section] = value
        former[old] = new
    return found, former


def section_of(kind: type[R], section: str, stored: Mapping[str, Any]) -> R:
    """The dataclass of a recipe's section, as a checkpoint of any age stores it."""
    present, _ = with_present_names({section: stored})
    return from_dict(kind, present[section])


def _both(old: str, new: str) -> str:
    return f"{old} is now {new}; give one of them, not both"


def _present_name(key: str, known: Container[str]) -> tuple[str, str]:
    """An override's key -> the entry of `RENAMED` that it is or lies in, and the key under its present name."""
    for old, new in RENAMED.items():
        if new in known and f"{key}.".startswith(f"{old}."):
            return old, new + key.removeprefix(old)
    return "", key


def _override(word: str) -> tuple[str, Any]:
    """ "section.key=value" -> key and value."""
    key, equals, text = word.partition("=")
    if not equals or key.count(".") < 1 or not all(key.split(".")):
        raise RecipeError(f"override {word!r} is not of the form section.key=value")
    try:
        return key, tomllib.loads(f"x = {text}")["x"]
    except ValueError:
        return key, text  # a bare word is a string, as on any command line


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override of {key}: {section!r} is a value, not a section")
    data[name] = value


def keys_of(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], type[Any]]]:
    """Every key of a recipe's class -> its dotted name, type, field, and the dataclass that declares it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = next((a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), None)
        if inner is None:
            yield f"{prefix}{field.name}", hint, field, kind
        else:
            yield from keys_of(typing.cast(type[Any], inner), f"{prefix}{field.name}.")


def from_dict(kind: type[R], data: Mapping[str, Any], where: str = "") -> R:
    """Build the dataclass `kind` from plain data, refusing unknown keys, wrong types and missing values."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where.rstrip('.')} is {data!r}; it must be a section")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in data:
        if key not in fields:
            raise RecipeError(f"unknown recipe key {where}{key}; {did_you_mean(key, fields, where)}")
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
    if hint is Any:  # arguments of other libraries' constructors; their numbers are checked too
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                _coerce(Any, inner, f"{where}.{key}")
        return _finite(value, where)
    if origin is Annotated and isinstance(arguments[1], Registry):
        if not isinstance(value, str) or value not in arguments[1]:
            raise RecipeError(f"{where} is {value!r}; {did_you_mean(str(value), arguments[1])}")
        return value
    if origin is Annotated:
        return value if value == math.inf else _coerce(arguments[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(_finite(value, where))
    plain = origin or hint
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r} ({type(value).__name__}); it must be of type {_name(hint)}")
    return _finite(value, where)


def _finite(value: Any, where: str) -> Any:
    """The value. Raises RecipeError for NaN, infinities and integers beyond 64 bits."""
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
        lines.extend(f"{k} = {toml_value(v)}" for k, v in plain.items() if v is not None)
        for key, section in value.items():
            if key not in plain:
                lines.append(f"\n[{key}]")
                emit(section, f"{key}.")

    emit(dataclasses.asdict(recipe), "")
    return "\n".join(lines).strip() + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def toml_value(value: Any) -> str:
    """A recipe's value in TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if value == math.inf:
        return "inf"
    return json.dumps(value)  # strings, booleans, ints and finite floats are written alike in JSON and TOML
