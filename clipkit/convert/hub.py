"""Published models: their names, and their files on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import logging
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit._version import __version__
from clipkit.errors import CheckpointError, UsageError, shown
from clipkit.io import sha256, write_atomically

if TYPE_CHECKING:
    from clipkit.models.clip import CLIP

PREFIX = "hf-hub:"
WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""Names of weight files, and of the indices of models in several files, in the order in which they are looked for."""
_AROUND = (
    "open_clip_config.json",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Published:
    """A repository of the hub, and whether its weights were trained with the quick GELU, where that is known."""

    repository: str
    quick_gelu: bool | None = None


@cache
def known() -> dict[str, Published]:
    """open_clip's names, "architecture/pretraining", for those models that clipkit has the towers of."""
    table = json.loads(files("clipkit").joinpath("assets/published.json").read_text(encoding="utf-8"))
    return {name: Published(entry["hub"], bool(entry.get("quick_gelu"))) for name, entry in table.items()}


def find(name: str) -> Published | None:
    """The model of a name like "ViT-B-32/laion2b_s34b_b79k" or "hf-hub:organisation/name"; None for other names.

    Raises UsageError for "-quickgelu" before weights that were trained with the plain one.
    """
    if name.startswith(PREFIX):
        return Published(name.removeprefix(PREFIX))
    found = known().get(name.replace("-quickgelu/", "/"))
    if found is not None and "-quickgelu/" in name and not found.quick_gelu:
        raise UsageError(f"{name}: these weights were trained with plain GELU; omit -quickgelu")
    return found


def suggestion(name: str) -> str:
    """A similar name, as the end of an error message; empty when there is none."""
    close = difflib.get_close_matches(name, known(), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def fetch(published: Published) -> Path:
    """The folder with this model's configuration, tokenizer and weights, fetched where they are not in the cache yet.

    The weights' sha256 is checked where the hub tells it. With HF_HUB_OFFLINE=1 only the cache is looked at.
    Raises CheckpointError when there is no such repository, no network, or the file came damaged.
    """
    from huggingface_hub import file_download, utils  # noqa: F401  (the import sets the level of its log)
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # errors reach the caller as exceptions
    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    repository = published.repository
    name = shown(repository)
    commit: str | None = None
    weights: Path | None = None
    offline = not _reachable()
    try:
        for file in (*_AROUND, *WEIGHTS):
            if file in WEIGHTS and weights is not None:
                break
            found = _file(repository, file, commit, offline)
            commit = found.parent.name if found is not None else commit
            weights = found if file in WEIGHTS else None
        files = [_need(repository, file, commit, offline) for file in _shards(weights)]
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"hub repository {name} wants you to accept its terms and log in: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no repository {name}, or not for you (hf auth login)") from None
    except Exception as error:  # the hub's library lets those of its HTTP library through, which changes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(
            f"cannot fetch {name} from the hub ({reason}); without a network, give a folder that holds its files"
        ) from None
    if weights is None:
        raise CheckpointError(f"hub repository {name} has no weights ({', '.join(WEIGHTS)})")
    for path in (weights, *files):
        _check(path)
    return weights.parent


def _shards(weights: Path | None) -> list[str]:
    """The files that make up the weights, if this is their index."""
    from clipkit.convert import unpickling

    return unpickling.shards(weights) if weights is not None and weights.name.endswith(unpickling.INDEX) else []


def _need(repository: str, name: str, commit: str | None, offline: bool) -> Path:
    if (found := _file(repository, name, commit, offline)) is None:
        raise CheckpointError(f"hub repository {shown(repository)} lacks {name}, which the index of its weights lists")
    return found


def _reachable() -> bool:
    """Whether the hub answers at all; asked once, for its library would ask for half a minute."""
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _file(repository: str, name: str, commit: str | None, offline: bool) -> Path | None:
    """A file of the repository at this commit (the newest for None), or None where it has no such file.

    Without a network, a file beside the weights that nobody asked for before counts as not there: an older clipkit
    fetched fewer of them.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=commit, local_files_only=offline))
    except LocalEntryNotFoundError:  # no network; whether the file exists may be known from before
        known_as = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(known_as, str) or (known_as is None and name not in _AROUND):
            raise
        return None
    except EntryNotFoundError:
        return None


def _check(weights: Path) -> None:
    blob = weights.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and (digest := sha256(blob)) != blob.name:  # the cache's names
        blob.unlink()
        raise CheckpointError(
            f"{weights} came damaged: its sha256 is {digest[:12]}, not {blob.name[:12]}; fetch it again"
        )


def card(model: CLIP, name: str) -> str:
    """A model card: architecture and usage; training data, evaluation and licence are for its author to add."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    return f"""---
library_name: open_clip
tags: [clip, clipkit, zero-shot-image-classification]
pipeline_tag: zero-shot-image-classification
---
# {name}

A CLIP of {parameters / 1e6:.1f} million parameters, exported by clipkit {__version__}.

| | |
|---|---|
| image encoder | {config.image_tower}, {config.image_size} x {config.image_size} pixels |
| text encoder | {config.text_layers} layers, width {config.text_width}, {config.context_length} tokens |
| embedding | {config.embed_dim} |
| activation of the text encoder | {config.conventions.text_activation} |
| logit scale | {float(model.logit_scale.detach()):.2f} |

```python
import clipkit

clip = clipkit.load("hf-hub:{name}")
```

Training data, evaluation, licence, intended use and limits: to be written by the publisher.
"""


def push(model: CLIP, folder: Path, name: str) -> str:
    """Write the model card into `folder` and upload it as hub repository `name` -> its address.

    Raises CheckpointError without a network or a login.
    """
    from huggingface_hub import HfApi

    if not (folder / "README.md").is_file():
        write_atomically(folder / "README.md", card(model, name))
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the hub's library lets those of its HTTP library through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(f"cannot push to {name} ({reason}); log in with hf auth login") from None
