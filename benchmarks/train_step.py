"""One training step of clipkit beside open_clip's, in turns: `python benchmarks/train_step.py [--json]`.

The same towers (timm's ViT, a text transformer of the same shape), batch, precision, optimizer settings, and captions
of ordinary length. Each side has its own process, as clipkit's training keeps freed memory by a setting of the whole
process; they take turns, so that a busy machine slows both: look at the ratio, not at the seconds. open_clip is in the
[parity] extra.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from clipkit.config import OptimConfig
from clipkit.malloc import keep_pages
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.train.losses import info_nce
from clipkit.train.optim import make_optimizer

VOCABULARY, END = 49408, 49407
SETTINGS = OptimConfig(lr=5e-4, weight_decay=0.2)
SHAPES = {
    "vit_b_32": {"tower": "vit_base_patch32_224", "embed": 512, "width": 512, "layers": 12, "heads": 8},
    "vit_tiny": {"tower": "vit_tiny_patch16_224", "embed": 256, "width": 256, "layers": 4, "heads": 4},
}


def ours(shape: dict[str, object], precision: str) -> Callable[[Tensor, Tensor], float]:
    """clipkit's step on uint8 images and trimmed ids."""
    config = CLIPConfig(
        str(shape["tower"]),
        224,
        embed_dim=shape["embed"],  # type: ignore[arg-type]
        text_width=shape["width"],  # type: ignore[arg-type]
        text_layers=shape["layers"],  # type: ignore[arg-type]
        text_heads=shape["heads"],  # type: ignore[arg-type]
    )
    model = CLIP(config, VOCABULARY, END).train()
    optimizer = make_optimizer(model, SETTINGS)

    def step(images: Tensor, ids: Tensor) -> float:
        optimizer.zero_grad()
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]  # what clipkit's tokenizer returns
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            image, text = model.encode_image(images), model.encode_text(ids)
        loss = info_nce(image, text, model.logit_scale)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.clamp_logit_scale()
        return float(loss.detach())

    return step


def open_clip_model(shape: dict[str, object], image_size: int) -> nn.Module:
    """open_clip's CLIP with timm's tower and a text transformer of this shape, in training mode."""
    import open_clip

    config = {
        "embed_dim": shape["embed"],
        "vision_cfg": {
            "timm_model_name": shape["tower"],
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": VOCABULARY,
            "width": shape["width"],
            "heads": shape["heads"],
            "layers": shape["layers"],
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "clipkit-benchmark.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        model: nn.Module = open_clip.create_model("clipkit-benchmark", output_dict=True).train()
    return model


def open_clip_optimizer(model: nn.Module, lr: float, config: OptimConfig) -> torch.optim.Optimizer:
    """As its training script makes it."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}]
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=1e-6)


def theirs(shape: dict[str, object], precision: str) -> Callable[[Tensor, Tensor], float]:
    """open_clip's step as its training script does it: float images, ids padded to 77."""
    import open_clip

    model = open_clip_model(shape, 224)
    loss_function = open_clip.ClipLoss(cache_labels=True)
    optimizer = open_clip_optimizer(model, SETTINGS.lr, SETTINGS)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)

    def step(images: Tensor, ids: Tensor) -> float:
        optimizer.zero_grad()
        pixels = (images.float() / 255 - mean.to(images.device)) / std.to(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_function(**model(pixels, ids))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator,union-attr]
        return float(loss.detach())

    return step


def captions(batch: int) -> Tensor:
    """Ids of ordinary captions, 6 to 22 tokens, padded to 77."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(batch, 77, dtype=torch.int64)
    for row in ids:
        length = int(torch.randint(6, 23, (), generator=generator))
        row[:length] = torch.randint(1, END - 1, (length,), generator=generator)
        row[0], row[length - 1] = END - 1, END
    return ids


SIDES = {
    "clipkit": (ours, keep_pages),
    "unkept": (ours, nullcontext),  # clipkit's, where freed memory goes back to the system as it does by default
    "open_clip": (theirs, nullcontext),
}


def take_turns(asked: Connection, side: str, name: str, precision: str, batch: int, threads: int) -> None:
    """What a side's process does: a step for each True, answered with its seconds, until False."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make_step, memory = SIDES[side]
    step = make_step(SHAPES[name], precision)
    images, ids = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8), captions(batch)
    with memory():
        while asked.recv():
            began = time.perf_counter()
            step(images, ids)
            asked.send(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args()
    rows, threads = [], torch.get_num_threads()
    for name in options.model:
        for precision in options.precision:
            sides: dict[str, Connection] = {}
            seconds: dict[str, list[float]] = {side: [] for side in SIDES}
            for side in SIDES:
                sides[side], end = multiprocessing.Pipe()
                arguments = (end, side, name, precision, options.batch, threads)
                multiprocessing.get_context("spawn").Process(target=take_turns, args=arguments, daemon=True).start()
                end.close()  # so that the end of the process is heard
            for turn in range(options.rounds + 1):
                for side, connection in sides.items():
                    connection.send(True)
                    taken = connection.recv()
                    if turn:  # the first turn warms up
                        seconds[side].append(taken)
            for connection in sides.values():
                connection.send(False)
            row = {"model": name, "precision": precision, "batch": options.batch, "threads": threads}
            row |= {f"{side}_s": statistics.median(taken) for side, taken in seconds.items()}
            for side, key in (("clipkit", "ratio"), ("unkept", "unkept_ratio")):
                pairs = zip(seconds[side], seconds["open_clip"], strict=True)
                row[key] = statistics.median(a / b for a, b in pairs)
            rows.append(row)
            print(
                f"{name} {precision} batch {options.batch}: clipkit {row['clipkit_s']:.2f} s, "
                f"open_clip {row['open_clip_s']:.2f} s, ratio {row['ratio']:.2f}; "
                f"without keep_pages {row['unkept_s']:.2f} s, ratio {row['unkept_ratio']:.2f}",
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
