"""Weight averaging of several CLIPs: one model, as fast as each, and often better than the best of them.

A fine-tuned model with its initial weights (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903), or several fine-tuned
from the same weights (model soups, Wortsman et al. 2022, arXiv 2203.05482). Averages of models that were trained from
different random weights are useless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clipkit import checkpoint, inputs
from clipkit.checkpoint import Checkpoint
from clipkit.config import DataConfig, from_dict
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import written_whole
from clipkit.models import pretrained
from clipkit.models.clip import CLIP

_BATCH, _BATCHES = 256, 20


def average(runs: Sequence[str | Path], out: Path, shares: Sequence[float] = ()) -> Path:
    """Write the average of the CLIPs `runs`, each with its share (equal shares if none are given) -> the folder.

    `out` loads as a run does, and `finetune.init_from` takes it; its training cannot be resumed. BatchNorm statistics
    are not averaged but measured for the averaged weights, on some 5,000 views of the last run's data (Izmailov et al.
    2018, arXiv 1803.05407, section 3.2).

    Raises UsageError for fewer than two runs, shares that are not theirs, or an `out` that holds something or cannot be
    written; CheckpointError for runs that do not fit each other, ShardError when the data for the statistics is gone.
    """
    weights = _weights(len(runs), shares)
    inputs.check_new(out)
    found = [pretrained.find(run, "clip") for run in runs]
    averaged = found[-1].tensors("ema")
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            averaged[name] = torch.zeros_like(tensor, dtype=torch.float64)
    for one, weight in zip(found, weights, strict=True):
        _add(averaged, one, weight, found[-1])
    last = found[-1]
    model = pretrained.load(last.path.parents[1], "cpu").model
    model.load_state_dict(averaged)
    _measure_statistics(model, last)
    made_of = [{"run": str(run), "share": weight} for run, weight in zip(runs, weights, strict=True)]
    texts = {"tokenizer.json": last.text("tokenizer.json")}
    state = {**last.state, "averaged": made_of}
    with written_whole(out) as aside:
        written = checkpoint.save(aside, state, {"ema": model.state_dict()}, texts, keep_last=1).relative_to(aside)
    return out / written


def _weights(runs: int, shares: Sequence[float]) -> list[float]:
    if runs < 2:
        raise UsageError(f"{runs} run; an average is of two or more")
    if shares and not (len(shares) == runs and all(share >= 0 for share in shares) and 0 < sum(shares) < math.inf):
        raise UsageError(f"shares {', '.join(f'{s:g}' for s in shares)} for {runs} runs; give each one, 0 or more")
    return [share / sum(shares) for share in shares] if shares else [1 / runs] * runs


def _add(total: dict[str, Tensor], found: Checkpoint, weight: float, like: Checkpoint) -> None:
    """Add a run's weights, if tokenizer and towers are those of `like`."""
    if found.text("tokenizer.json") != like.text("tokenizer.json"):
        raise CheckpointError(f"{found.path} has another tokenizer than {like.path}; average runs that share one")
    tensors = found.tensors("ema")
    unlike = [n for n in tensors.keys() | total.keys() if n not in tensors or n not in total]
    unlike += [n for n in tensors.keys() & total.keys() if tensors[n].shape != total[n].shape]
    if unlike:
        raise CheckpointError(f"{found.path} has other towers than {like.path}: {min(unlike)} is not alike in both")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            total[name].add_(tensor.double(), alpha=weight)


def _measure_statistics(model: CLIP, found: Checkpoint) -> None:
    """Set BatchNorm statistics to their means over batches of the run's data."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    recipe = found.state["recipe"]  # maybe of an older version: only the keys used here are checked
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
