"""Sources of trained CLIPs: a run, a release, a published name, a folder or file of another library.

`open_source` is the only way from a name to a model: `clipkit.load`, fine-tuning, weight averaging, the teachers of a
distillation and noise-aware CLIPs use it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from clipkit import DEFAULT_MODEL, checkpoint
from clipkit.checkpoint import Checkpoint
from clipkit.config import from_dict
from clipkit.convert import hub, tokenizer_files, unpickling, weights
from clipkit.data.images import SUFFIXES
from clipkit.errors import CheckpointError, RecipeError, shown
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.tokenizer import AnyTokenizer, Tokenizer, tokenizer_from_json


@dataclass(frozen=True)
class Source:
    """A trained CLIP: its configuration with the compatibility switches, its weights, tokenizer and vocabulary."""

    name: str
    """The name or place by which it was asked for."""
    place: Path
    """The checkpoint of a run, or the file with the weights."""
    config: CLIPConfig
    tokenizer: AnyTokenizer
    read: Callable[[], dict[str, Tensor]] = field(repr=False)
    """Reads the weights: those of a run are the exponential moving average."""
    words: Sequence[str] = field(default=(), repr=False)
    """All words of the captions that it was trained on; empty where they are not recorded, as for published weights."""
    checkpoint: Checkpoint | None = None
    """The checkpoint of a run of ours."""

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding; published models may have more than their tokenizer has tokens."""
        if self.checkpoint is None:
            return self.config.vocab_size
        rows = (len(tensor) for name, tensor in self.checkpoint.stream("ema") if name == "text.tokens.weight")
        return next(rows, self.tokenizer.vocab_size)

    def build(self) -> CLIP:
        """The model, on the CPU and in evaluation mode. Raises CheckpointError for weights that do not fit it."""
        tensors = self.read()
        model = CLIP(self.config, self.vocabulary, self.tokenizer.end_id)
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):  # counted in training only; some files omit it
                tensors.setdefault(name, tensor)
            if name in tensors and tensors[name].shape != tensor.shape:
                shapes = f"{list(tensors[name].shape)} where {list(tensor.shape)} is due"
                raise CheckpointError(f"{self.place} holds another architecture: {name} is {shapes}")
        wrong = model.load_state_dict(tensors, strict=False)
        if names := [*wrong.missing_keys, *wrong.unexpected_keys]:
            says = "its recipe" if self.checkpoint else self.place.parent.name
            counts = f"{len(wrong.missing_keys)} tensors missing and {len(wrong.unexpected_keys)} too many"
            raise CheckpointError(
                f"{self.place} holds another architecture than {says} says: {counts}, such as {names[0]}"
            )
        return model.eval()


def open_source(name: str | Path) -> Source:
    """The CLIP that `name` stands for.

    `name` is "clipkit-tiny", which comes with the package; the folder of a run or of a release; a folder with an
    open_clip_config.json, or with the config.json of transformers' CLIP or SigLIP; a file of OpenAI's, state dict or
    TorchScript archive; "architecture/pretraining" in open_clip's words, or "hf-hub:organisation/name", which are
    fetched from the hub.
    Nothing in these files is run. Raises CheckpointError when `name` is none of this, its files are damaged, or its
    architecture is one that clipkit does not have.
    """
    path = folder_of(name)
    if not os.path.exists(path) and (published := hub.find(str(name))) is not None:
        return _published(str(name), hub.fetch(published), published.quick_gelu)
    if is_external(path):
        return _published(str(name), path, None)
    if not os.path.exists(path) and (meant := hub.suggestion(str(name))):
        raise CheckpointError(f"{shown(name)} is neither a folder nor a published model; {meant}")
    return source_of(find(name, "clip"), str(name))


def source_of(found: Checkpoint, name: str = "") -> Source:
    """The CLIP of a run's checkpoint."""
    config = from_dict(CLIPConfig, found.state["recipe"]["model"])
    return Source(
        name=name or str(found.path.parents[1]),
        place=found.path,
        config=config,
        tokenizer=tokenizer_of(found, config),
        read=lambda: found.tensors("ema"),
        words=[str(word) for word in json.loads(found.text("words.json", default="[]"))],
        checkpoint=found,
    )


def tokenizer_of(found: Checkpoint, config: CLIPConfig) -> AnyTokenizer:
    """The tokenizer in a checkpoint of a model of this shape."""
    conventions = config.conventions
    return tokenizer_from_json(
        found.text("tokenizer.json"), config.context_length, conventions.text_cleaning, conventions.pad_id
    )


# Runs


def folder_of(name: str | Path) -> Path:
    """The folder of a model of ours: one of this name, or the model that comes with the package."""
    if str(name) == DEFAULT_MODEL and not os.path.exists(name):
        return Path(__file__).resolve().parents[1] / "assets" / DEFAULT_MODEL
    return Path(name)


def find(path: str | Path, kind: str) -> Checkpoint:
    """The newest valid checkpoint of a run of this kind ("clip", "denoiser", "noisy_clip").

    `path` is the run's folder, or a folder that holds runs named after their kinds, or "clipkit-tiny". Of the tensors
    only the averaged weights are hashed here.
    Raises CheckpointError saying what was found instead.
    """
    folder = folder_of(path)
    for candidate in (folder, folder / kind):
        has_any = os.path.isdir(candidate / "checkpoints")
        found = checkpoint.latest(candidate, tensors=["ema"]) if has_any else None
        if found is not None and found.state.get("kind") == kind:
            return found
        if found is not None:
            raise CheckpointError(f"{candidate} is a {found.state.get('kind')} run; a {kind} run is needed")
    what = f"holds no {kind} checkpoint ({_contents(folder)})" if os.path.exists(folder) else "does not exist"
    give = "the folder of a training run" + (", or a name out of `clipkit models`" if kind == "clip" else "")
    raise CheckpointError(f"{shown(folder)} is not a model: it {what}; give {give}")


def _contents(folder: Path) -> str:
    """The likely content of a folder that holds no model."""
    if not folder.is_dir():
        return "it is a file"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    if any(name.startswith("part-") and name.endswith(".npy") for name in names):
        return "it is an index of pictures, which `clipkit search` takes"
    if any(name.endswith(".tar") for name in names):
        return "it is a pack of pictures and captions"
    if {"model_index.json", "diffusion_pytorch_model.safetensors"} & set(names):
        return "it is a folder of diffusers"
    if there := next((name for name in hub.WEIGHTS if name in names), None):
        return f"it has {there}, but neither {weights.OPEN_CLIP} nor {weights.TRANSFORMERS}"
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return "it is a folder of pictures"
    return f"it has {shown(names[0])}" + (f" and {len(names) - 1} more" if names[1:] else "")


# Published weights


def is_external(path: Path) -> bool:
    """Whether weights of another library may be there: a file, or a folder with a configuration."""
    configurations = (weights.OPEN_CLIP, weights.TRANSFORMERS)
    return os.path.isfile(path) or any(os.path.isfile(path / name) for name in configurations)


def _published(name: str, path: Path, quick_gelu: bool | None) -> Source:
    """`quick_gelu`: whether the weights are known to be trained with it."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else _weights_file(path)
    archive = unpickling.read(file)
    try:
        files = tokenizer_files.read_tokenizer(folder)
        config, tensors = weights.to_ours(folder, archive, files)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (AttributeError, KeyError, OverflowError, RecipeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = shown(error if isinstance(error, RecipeError) else f"{type(error).__name__} {error}")
        raise CheckpointError(f"{file}: the configuration beside it makes no model ({reason})") from None
    activation = config.conventions.text_activation
    if quick_gelu is not None and quick_gelu != (activation == "quick_gelu"):
        trained = "with quick_gelu" if quick_gelu else "without the quick GELU"
        raise CheckpointError(
            f"{folder} says that the activation is {activation}; these weights were trained {trained}"
        )
    tokenizer = _tokenizer(folder, config, files)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, and a model of {config.vocab_size}"
        )
    return Source(name, file, config, tokenizer, read=lambda: dict(tensors))


def _weights_file(folder: Path) -> Path:
    found = next((folder / name for name in hub.WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights; looked for {', '.join(hub.WEIGHTS)}")
    return found


_MERGES = "bpe_simple_vocab_16e6.txt.gz"


def _tokenizer(folder: Path, config: CLIPConfig, files: tokenizer_files.TokenizerFiles) -> AnyTokenizer:
    """The one beside the weights; for CLIP's vocabulary a merges file will do, also that of an installed open_clip."""
    conventions = config.conventions
    length = min(config.context_length, files.longest or config.context_length)
    if files.text:
        return tokenizer_from_json(files.text, length, conventions.text_cleaning, conventions.pad_id)
    if conventions.text_cleaning != "clip":
        raise CheckpointError(f"{folder} has no tokenizer.json, which these weights need")
    open_clip = importlib.util.find_spec("open_clip")
    candidates = [folder / "merges.txt", folder / _MERGES]
    if open_clip is not None and open_clip.origin is not None:
        candidates.append(Path(open_clip.origin).parent / _MERGES)
    for merges in candidates:
        if merges.is_file():
            return Tokenizer.clip(merges, length)
    raise CheckpointError(
        f"{folder} has no tokenizer; put CLIP's {_MERGES} (or a tokenizer.json) there, or install open_clip_torch, "
        "which brings it"
    )
