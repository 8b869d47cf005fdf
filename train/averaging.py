"""Weight averaging: one model of several CLIPs' weights, as fast as each and often better than the best of them.

WiSE-FT averages a fine-tuned model and the one it started from (Wortsman et al. 2021, arXiv 2109.01903); a model soup
averages several that were fine-tuned from the same weights (Wortsman et al. 2022, arXiv 2203.05482). The average of
models that started from different random weights is useless.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit import checkpoint, inputs
from clipkit.config import DataConfig, from_dict
from clipkit.data.loader import Stream
from clipkit.data.manifest import is_pack
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import written_whole
from clipkit.models.clip import CLIP
from clipkit.models.source import Source, open_source

_BATCH, _BATCHES = 256, 20


def average(runs: Sequence[str | Path], out: Path, shares: Sequence[float] = ()) -> Path:
    """Write the weight average of the CLIPs `runs`, each with its share (equal ones by default) -> the checkpoint.

    `runs` are names and places that `clipkit.load` takes, published models included. `out` loads as a run does, and
    fine-tuning starts from it; its training cannot be resumed. Statistics of BatchNorms are not averaged: those of the
    averaged weights are measured, on some 5,000 views of the data of the last run whose pack is here (Izmailov et al.
    2018, arXiv 1803.05407, section 3.2).

    Raises UsageError for fewer than two runs, shares that do not match them, BatchNorms where none of the models is a
    run with data, and an `out` that holds files or cannot be written; CheckpointError for models that do not fit each
    other; ShardError when the data for the statistics is gone.
    """
    weights = _weights(len(runs), shares)
    inputs.check_new(out)
    sources = [open_source(run) for run in runs]
    last = max(reversed(sources), key=_knows_data)  # the last one of equals
    model = last.build()
    averaged = {
        name: torch.zeros_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    for source, weight in zip(sources, weights, strict=True):
        _add(averaged, source, weight, last)
    model.load_state_dict(averaged)
    _measure_statistics(model, last)
    state = _state(last, [{"run": str(run), "share": weight} for run, weight in zip(runs, weights, strict=True)])
    texts = {"tokenizer.json": last.tokenizer.to_json()}
    if all(source.words for source in sources):  # all words that any of the models was trained on
        words = sorted({word for source in sources for word in source.words})
        texts["words.json"] = json.dumps(words, ensure_ascii=False)
    with written_whole(out) as aside:
        written = checkpoint.save(aside, state, {"ema": model.state_dict()}, texts, keep_last=1).relative_to(aside)
    return out / written


def _knows_data(source: Source) -> int:
    """2 for a run whose pack is here, 1 for any other run or release, 0 for published weights."""
    if source.checkpoint is None:
        return 0
    shards = str((source.checkpoint.state["recipe"].get("data") or {}).get("shards", ""))
    return 2 if is_pack(shards) else 1


def _state(last: Source, made_of: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint's state: that of the last run, or of a run without training where all models are published."""
    published = {"kind": "clip", "step": 0, "recipe": {"model": dataclasses.asdict(last.config)}}
    return {**(published if last.checkpoint is None else last.checkpoint.state), "averaged": made_of}


def _weights(runs: int, shares: Sequence[float]) -> list[float]:
    if runs < 2:
        raise UsageError(f"{runs} run; an average is of two or more")
    if shares and not (len(shares) == runs and all(share >= 0 for share in shares) and 0 < sum(shares) < math.inf):
        raise UsageError(f"shares {', '.join(f'{s:g}' for s in shares)} for {runs} runs; give each one, 0 or more")
    return [share / sum(shares) for share in shares] if shares else [1 / runs] * runs


def _add(total: dict[str, Tensor], source: Source, weight: float, like: Source) -> None:
    """Add a model's weights, if they are of the same kind as those of `like`. Raises CheckpointError."""
    if source.tokenizer.fingerprint != like.tokenizer.fingerprint:
        raise CheckpointError(
            f"{source.place} has another tokenizer than {like.place}; average models that started from the same weights"
        )
    for name in ("text_heads", "conventions"):
        theirs, ours = getattr(source.config, name), getattr(like.config, name)
        if theirs != ours:
            raise CheckpointError(f"{source.place} has another model.{name} than {like.place}: {theirs}, not {ours}")
    tensors = source.build().state_dict()
    unlike = [n for n in tensors.keys() | total.keys() if n not in tensors or n not in total]
    unlike += [n for n in tensors.keys() & total.keys() if tensors[n].shape != total[n].shape]
    if unlike:
        raise CheckpointError(f"{source.place} has other encoders than {like.place}: {min(unlike)} differs")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            total[name].add_(tensor.double(), alpha=weight)


def _measure_statistics(model: CLIP, source: Source) -> None:
    """Set the statistics of the model's BatchNorms to their means over batches of the run's own data."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    recipe = {} if source.checkpoint is None else source.checkpoint.state["recipe"]
    if "data" not in recipe:
        raise UsageError(
            f"{source.name} has BatchNorms, whose statistics are measured on a run's data, and none of these is a run"
        )
    # The recipe may be of an older version: only the keys that are used are checked.
    data = from_dict(DataConfig, recipe["data"], "data.")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    stream = Stream(Shards(data.shards), data, model.config.image_size, _BATCH, recipe["run"]["seed"])
    with torch.no_grad():
        for batch in stream.batches(0, _BATCHES):
            model.encode_image(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
