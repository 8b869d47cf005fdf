"""`clipkit.load`: a trained CLIP with its tokenizer and preprocessing, ready to use."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipkit import DEFAULT_MODEL, checkpoint, distributed
from clipkit.checkpoint import Checkpoint
from clipkit.config import from_dict
from clipkit.convert import hub, processors, unpickling, weights
from clipkit.convert.release import half
from clipkit.data.images import SUFFIXES, preprocessing
from clipkit.errors import CheckpointError, RecipeError, shown
from clipkit.io import read_object
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.tokenizer import AnyTokenizer, ForeignTokenizer, Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode; `preprocess(image)` gives uint8 [3, S, S], `tokenizer(texts)` gives ids [B, L]."""

    model: CLIP
    tokenizer: AnyTokenizer
    preprocess: Callable[[Image.Image], Tensor]
    words: Sequence[str] = field(default=(), repr=False)
    """All words of the captions that it learned from; none where that is not known, as of published weights."""


def folder_of(name: str | Path) -> Path:
    """Where a model of ours is: a folder of this name, or the one that comes with the package."""
    if str(name) == DEFAULT_MODEL and not os.path.exists(name):
        return Path(__file__).resolve().parents[1] / "assets" / DEFAULT_MODEL
    return Path(name)


def find(path: str | Path, kind: str) -> Checkpoint:
    """The newest valid checkpoint of a run of this kind ("clip", "denoiser", "noisy_clip").

    `path` is the run's folder, or a folder that holds runs named after their kinds, or "clipkit-tiny".
    Raises CheckpointError saying what was found instead.
    """
    folder = folder_of(path)
    for candidate in (folder, folder / kind):
        found = checkpoint.latest(candidate) if os.path.isdir(candidate / "checkpoints") else None
        if found is not None and found.state.get("kind") == kind:
            return found
        if found is not None:
            raise CheckpointError(f"{candidate} is a {found.state.get('kind')} run; a {kind} run is needed")
    what = f"holds no {kind} checkpoint ({_contents(folder)})" if os.path.exists(folder) else "does not exist"
    give = "the folder of a training run" + (", or a name out of `clipkit models`" if kind == "clip" else "")
    raise CheckpointError(f"{shown(folder)} is not a model: it {what}; give {give}")


def _contents(folder: Path) -> str:
    """What a folder that is no model may be."""
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
        return f"it has {there}, but neither open_clip_config.json nor config.json"
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return "it is a folder of pictures"
    return f"it has {shown(names[0])}" + (f" and {len(names) - 1} more" if names[1:] else "")


def load(name: str | Path = DEFAULT_MODEL, device: str = "auto") -> Pretrained:
    """A CLIP with its tokenizer and preprocessing, from whoever trained it.

    `name` is "clipkit-tiny", which comes with the package; the folder of one of our runs (its averaged weights are
    taken); a folder with an open_clip_config.json, or with the config.json of transformers' CLIP or SigLIP; a file of
    OpenAI's, state dict or TorchScript archive; "architecture/pretraining" as open_clip calls it, or
    "hf-hub:organisation/name", which are fetched from the hub.
    Nothing that lies in these files is run. Raises CheckpointError when `name` is none of this, its files are damaged,
    or its architecture is one that clipkit does not have.
    """
    path, quick_gelu = folder_of(name), None
    if not os.path.exists(path) and (published := hub.find(str(name))) is not None:
        path, quick_gelu = hub.fetch(published), published.quick_gelu
    if is_foreign(path):
        return _load_foreign(path, device, quick_gelu)
    if not os.path.exists(path) and (meant := hub.suggestion(str(name))):
        raise CheckpointError(f"{shown(name)} is neither a folder nor a published model; {meant}")
    found = find(name, "clip")
    config = from_dict(CLIPConfig, found.state["recipe"]["model"])
    tokenizer = Tokenizer.from_json(found.text("tokenizer.json"), config.context_length)
    model = CLIP(config, tokenizer.vocab_size, tokenizer.end_id)
    load_weights(model, found)
    words = [str(word) for word in json.loads(found.text("words.json", default="[]"))]
    return _ready(model, tokenizer, device, words)


def _ready(model: CLIP, tokenizer: AnyTokenizer, device: str, words: Sequence[str] = ()) -> Pretrained:
    model.to(distributed.choose_device(device)).eval()
    return Pretrained(model, tokenizer, preprocessing(model.config), words)


_CONFIGS = ("open_clip_config.json", "config.json")


def is_foreign(path: Path) -> bool:
    """Is there what `load` takes for weights that are not a run's: a file, or a folder with a configuration?"""
    return os.path.isfile(path) or any(os.path.isfile(path / config) for config in _CONFIGS)


def _load_foreign(path: Path, device: str, quick_gelu: bool | None) -> Pretrained:
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else _weights_file(path)
    archive = unpickling.read(file)
    try:
        files = processors.read_tokenizer(folder)
        config, tensors = _understand(folder, archive, files)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (AttributeError, KeyError, OverflowError, RecipeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = shown(error if isinstance(error, RecipeError) else f"{type(error).__name__} {error}")
        raise CheckpointError(f"{file}: the configuration beside it makes no model ({reason})") from None
    found = config.conventions.text_activation
    if quick_gelu is not None and quick_gelu != (found == "quick_gelu"):
        trained = "with quick_gelu" if quick_gelu else "without the quick GELU"
        raise CheckpointError(f"{folder} says that the activation is {found}; these weights were trained {trained}")
    tokenizer = _tokenizer(folder, config, files)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, and a model of {config.vocab_size}"
        )
    model = CLIP(config, config.vocab_size, tokenizer.end_id)
    wrong = model.load_state_dict(_fitting(model, tensors, file), strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        first = [*wrong.missing_keys, *wrong.unexpected_keys][0]
        what = f"{len(wrong.missing_keys)} tensors missing and {len(wrong.unexpected_keys)} too many, such as {first}"
        raise CheckpointError(f"{file} holds another architecture than {folder.name} says: {what}")
    return _ready(model, tokenizer, device)


def _fitting(model: CLIP, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # counted in training only; some files omit it
            tensors.setdefault(name, tensor)
        if name in tensors and tensors[name].shape != tensor.shape:
            shapes = f"{list(tensors[name].shape)} where {list(tensor.shape)} is due"
            raise CheckpointError(f"{file} holds another architecture: {name} is {shapes}")
    return tensors


def _understand(
    folder: Path, archive: unpickling.Archive, files: processors.TokenizerFiles
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    tensors = archive.tensors
    # Folders often have both configurations; the tensors say which of them they go with.
    theirs = (folder / "config.json").is_file() and weights.is_transformers(tensors)
    if (folder / "open_clip_config.json").is_file() and not theirs:
        return weights.from_open_clip(read_object(folder / "open_clip_config.json"), tensors, files)
    if (folder / "config.json").is_file():
        seen = processors.read_preprocessor(folder)
        return weights.from_transformers(read_object(folder / "config.json"), seen, tensors, files)
    if archive.scripted or weights.is_openai(tensors):
        return weights.from_openai(tensors)
    raise CheckpointError(
        "these weights do not say what model they belong to, nor whether its GELU is the quick one; put an "
        "open_clip_config.json beside them"
    )


def _weights_file(folder: Path) -> Path:
    found = next((folder / name for name in hub.WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has no weights; looked for {', '.join(hub.WEIGHTS)}")
    return found


def _tokenizer(folder: Path, config: CLIPConfig, files: processors.TokenizerFiles) -> AnyTokenizer:
    """The one beside the weights; for CLIP's vocabulary a merges file will do, also that of an installed open_clip."""
    conventions, length = config.conventions, min(config.context_length, files.longest or config.context_length)
    if files.text:
        if files.clip_like and conventions.text_cleaning == "clip":
            return Tokenizer.from_json(files.text, length)
        return ForeignTokenizer(files.encoder, length, conventions.text_cleaning, conventions.pad_id)
    if conventions.text_cleaning != "clip":
        raise CheckpointError(f"{folder} has no tokenizer.json, which these weights need")
    peer = importlib.util.find_spec("open_clip")
    around = [folder / "merges.txt", folder / _MERGES]
    if peer is not None and peer.origin is not None:
        around.append(Path(peer.origin).parent / _MERGES)
    for merges in around:
        if merges.is_file():
            return Tokenizer.clip(merges, length)
    raise CheckpointError(
        f"{folder} has no tokenizer; put CLIP's {_MERGES} (or a tokenizer.json) there, or install open_clip_torch, "
        "which brings it"
    )


_MERGES = "bpe_simple_vocab_16e6.txt.gz"


def load_weights(model: torch.nn.Module, found: Checkpoint) -> None:
    """Fill `model` with the averaged weights. Raises CheckpointError when they do not fit it."""
    try:
        model.load_state_dict(found.tensors("ema"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{found.path} does not fit its own recipe: {str(error).splitlines()[0][:120]}") from None


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of a model's weights."""
    return _hash(model.state_dict())


TRAINED_WITH = "trained_with.json"
"""File of a checkpoint: the recipe's key of each model that the training used, with its `identity`."""


def identity(model: torch.nn.Module) -> str:
    """Hash of a model's weights that is the same before and after `release`, which halves the precision of some."""
    return _hash({name: half(tensor) for name, tensor in model.state_dict().items()})


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
