"""Shards to augmented batches, clipkit beside open_clip, in turns: `python benchmarks/loader.py [--json]`.

The same webdataset shards of 256x256 JPEGs, the same random resized crop to 224, two worker processes each, batches of
64. An epoch of one side follows an epoch of the other, so that a busy machine slows both: look at the ratio. Both sides
deliver images and token ids; open_clip's images are normalised floats, clipkit's are bytes, which the model normalises
on its device. open_clip is in the [parity] extra.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from clipkit.config import DataConfig
from clipkit.data.loader import Stream
from clipkit.data.pack import pack
from clipkit.data.shards import Shards
from clipkit.data.sources import RawSample, Source
from clipkit.models.tokenizer import Tokenizer

SIZE, BATCH = 224, 64


def photographs(count: int) -> Iterator[RawSample]:
    """JPEGs of 256x256 with the spectrum of photographs: noise at four scales."""
    for i in range(count):
        rng = np.random.default_rng(i)
        picture = np.zeros((256, 256, 3))
        for cells, strength in ((4, 90), (16, 50), (64, 30), (256, 12)):
            noise = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
            channels = [Image.fromarray(noise[..., c]).resize((256, 256), Image.Resampling.BICUBIC) for c in range(3)]
            picture += np.stack([np.asarray(c) for c in channels], axis=-1)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield RawSample(buffer.getvalue(), (f"a photo of the red car number {i} in a street near the sea",), None)


def ours(folder: Path, workers: int) -> Callable[[], Iterator[int]]:
    """clipkit: uint8 images and token ids."""
    shards = Shards(folder, verify=False)
    tokenizer = Tokenizer.train(shards.captions(200), 1000)
    config = DataConfig(str(folder), workers=workers, crop_scale=0.9)
    stream = Stream(shards, config, SIZE, BATCH, 0, tokenizers=[tokenizer])
    steps = len(shards) // BATCH

    def epoch() -> Iterator[int]:
        for batch in stream.batches(0, steps):  # training has one loader for all epochs; here the sides take turns
            batch.ids(tokenizer)
            yield len(batch)

    return epoch


def theirs(folder: Path, workers: int) -> Callable[[], Iterator[int]]:
    """open_clip: the pipeline of its training script."""
    import open_clip
    import open_clip_train.data
    from open_clip.transform import AugmentationCfg, image_transform

    # webdataset 1.0 marks the end of a shard with an empty sample, which open_clip 3.3.0 (made for 0.2) stumbles over.
    expander = open_clip_train.data.tar_file_expander
    open_clip_train.data.tar_file_expander = partial(expander, eof_value=None)

    count = len(Shards(folder, verify=False))
    last = len(list(folder.glob("*.tar"))) - 1
    options = SimpleNamespace(
        train_data=f"{folder}/shard-{{000000..{last:06d}}}.tar",
        val_data=None,
        train_num_samples=count,
        val_num_samples=None,
        dataset_resampled=False,
        train_data_upsampling_factors=None,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        rank=0,
        distributed=False,
        seed=0,
    )
    transform = image_transform(SIZE, is_train=True, aug_cfg=AugmentationCfg())
    loader = open_clip_train.data.get_wds_dataset(
        options, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    ).dataloader

    def epoch() -> Iterator[int]:
        for images, _ in loader:
            yield len(images)

    return epoch


def timed(epoch: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Samples/s of an epoch, and seconds until its first batch."""
    began, first, seen = time.perf_counter(), 0.0, 0
    for count in epoch():
        seen += count
        first = first or time.perf_counter() - began
    return {"samples_per_s": seen / (time.perf_counter() - began), "first_batch_s": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pack"
        source = Source(photographs(options.samples), lambda: options.samples, "photographs", [], [])
        pack(source, folder, shard_size=-(-options.samples // 4))
        sides = {"clipkit": ours(folder, options.workers), "open_clip": theirs(folder, options.workers)}
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds + 1):
            for side, epoch in sides.items():
                rounds[side].append(timed(epoch))
    result: dict[str, float] = {"workers": options.workers, "samples": options.samples}
    for side, found in rounds.items():
        result[f"{side}_first_batch_s"] = found[0]["first_batch_s"]
        result[f"{side}_samples_per_s"] = statistics.median(r["samples_per_s"] for r in found[1:])
    pairs = zip(rounds["clipkit"][1:], rounds["open_clip"][1:], strict=True)
    result["ratio"] = statistics.median(a["samples_per_s"] / b["samples_per_s"] for a, b in pairs)
    for side in sides:
        speed, wait = result[f"{side}_samples_per_s"], result[f"{side}_first_batch_s"]
        out = sys.stderr if options.json else sys.stdout
        print(f"{side}: {speed:,.0f} samples/s, first batch after {wait:.2f} s", file=out)
    print(json.dumps(result) if options.json else f"ratio {result['ratio']:.2f}")


if __name__ == "__main__":
    main()
