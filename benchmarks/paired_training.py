"""clipkit and open_clip trained on the same shards: `python benchmarks/paired_training.py --shards PACK --val PACK`.

The same towers (timm's, a text transformer of one shape), vocabulary (CLIP's), batch, steps and optimizer settings,
fp32; each side reads and crops in its own way, with one worker. They take turns of `--turn` steps in one process, so
that a busy machine slows both. Prints images/s and zero-shot accuracy on `--val`, of the last weights. open_clip is in
the [parity] extra.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import webdataset
from torch import Tensor, nn
from train_step import open_clip_model, open_clip_optimizer

from clipkit.config import DataConfig, load_recipe
from clipkit.data.images import decode
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.train.optim import learning_rate, make_optimizer
from clipkit.train.pretrain import Pretraining, PretrainRecipe
from clipkit.train.step import backward
from clipkit.zeroshot.classify import evaluate
from clipkit.zeroshot.datasets import from_shards
from clipkit.zeroshot.heads import class_head

TEXT = {"width": 96, "layers": 2, "heads": 4}
EMBED = 128


class Ours:
    """clipkit's stream, towers, loss and optimizer, by `clipkit.train.step.backward`."""

    def __init__(self, options: argparse.Namespace) -> None:
        merges = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        model = {"image_tower": options.tower, "image_size": options.size, "embed_dim": EMBED, "merges": merges}
        model |= {f"text_{name}": value for name, value in TEXT.items()} | {"context_length": 77}
        words = [f"model.{name}={value}" for name, value in model.items()] + ["model.image_kwargs={}"]
        words += [f"data.shards={options.shards}", f"run.steps={options.steps}", f"run.batch_size={options.batch}"]
        words += [f"optim.lr={options.lr}", "run.ema_decay=0", "run.precision=fp32", "loss.positives=pair"]
        self.recipe = load_recipe(PretrainRecipe, "drawings_clip", words)
        self.task = Pretraining(self.recipe, Shards(options.shards))
        self.optimizer = make_optimizer(self.task.model, self.recipe.optim)
        data: DataConfig = self.recipe.data
        tokenizers = self.task.tokenizers
        stream = Stream(Shards(options.shards), data, options.size, options.batch, seed=0, tokenizers=tokenizers)
        self.batches = iter(stream.batches(0, options.steps))

    def step(self, rate: float) -> float:
        """One step at a learning rate -> the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss, _ = backward(self.task, next(self.batches))
        nn.utils.clip_grad_norm_(self.task.model.parameters(), self.recipe.run.grad_clip)
        self.optimizer.step()
        self.task.after_step()
        return float(loss)

    def accuracy(self, val: Shards) -> float:
        """Zero-shot top-1."""
        model = self.task.model.eval()
        head = class_head(model, self.task.tokenizer, val.classes, val.templates)
        found = evaluate(model, head, from_shards("val", val)).top1
        model.train()
        return found


class Theirs:
    """open_clip's model, loss, tokenizer and transforms, and webdataset's pipeline, as its training script has them."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape = {"tower": options.tower, "embed": EMBED, **TEXT}
        self.model = open_clip_model(shape, options.size)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=77)
        self.loss = open_clip.ClipLoss(cache_labels=True)
        recipe = load_recipe(PretrainRecipe, "drawings_clip")
        self.optimizer = open_clip_optimizer(self.model, options.lr, recipe.optim)
        self.grad_clip = recipe.run.grad_clip
        look = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        augmentation = open_clip.transform.AugmentationCfg(scale=(recipe.data.crop_scale, 1.0))
        self.transform = open_clip.image_transform(options.size, is_train=True, aug_cfg=augmentation, **look)
        self.preprocess = open_clip.image_transform(options.size, is_train=False, **look)
        self.batches = self._batches(options)

    def _batches(self, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
        tars = sorted(str(path) for path in Path(options.shards).glob("*.tar"))
        found = webdataset.WebDataset(
            [url for _ in range(10_000) for url in tars], shardshuffle=False, empty_check=False
        )
        found = found.shuffle(5000, initial=1000).decode("pilrgb").rename(image="jpg;png;webp", text="txt")
        found = found.map_dict(image=self.transform, text=lambda text: self.tokenizer(text)[0])
        found = found.to_tuple("image", "text").batched(options.batch, partial=False)
        yield from webdataset.WebLoader(found, batch_size=None, num_workers=1)

    def step(self, rate: float) -> float:
        """One step at a learning rate -> the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.loss(**self.model(*next(self.batches)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator,union-attr]
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, val: Shards) -> float:
        """Zero-shot top-1, by the same templates and class heads."""
        model: Any = self.model.eval()
        rows = []
        for names in val.classes:
            prompts = self.tokenizer([template.format(names[0]) for template in val.templates])
            rows.append(F.normalize(model.encode_text(prompts, normalize=True).mean(dim=0), dim=-1))
        head, right = torch.stack(rows), 0
        for start in range(0, len(val), 256):
            samples = [val.read(i) for i in range(start, min(start + 256, len(val)))]
            pixels = torch.stack([self.preprocess(decode(sample.image)) for sample in samples])
            guesses = (model.encode_image(pixels, normalize=True) @ head.T).argmax(dim=1)
            right += int((guesses == torch.tensor([sample.label for sample in samples])).sum())
        model.train()
        return right / len(val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--val", required=True, help="a pack with classes")
    parser.add_argument("--tower", default="convnext_atto")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--turn", type=int, default=25)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.manual_seed(0)
    sides: dict[str, Ours | Theirs] = {"clipkit": Ours(options), "open_clip": Theirs(options)}
    schedule = load_recipe(PretrainRecipe, "drawings_clip", [f"optim.lr={options.lr}"]).optim
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = dict.fromkeys(sides, 0.0)
    for start in range(0, options.steps, options.turn):
        turn = range(start, min(start + options.turn, options.steps))
        for name, side in sides.items():
            began = time.perf_counter()
            for step in turn:
                losses[name] = side.step(learning_rate(step, options.steps, schedule))
            seconds[name].append((time.perf_counter() - began) / len(turn))
    val = Shards(options.val)
    steady = slice(1, None) if len(seconds["clipkit"]) > 1 else slice(None)  # the first turn starts the workers
    found: dict[str, Any] = {
        "tower": options.tower,
        "size": options.size,
        "batch": options.batch,
        "steps": options.steps,
    }
    for name, side in sides.items():
        taken = seconds[name][steady]
        found[name] = {
            "images_per_s": options.batch * len(taken) / sum(taken),
            "loss": losses[name],
            "top1": side.accuracy(val),
        }
    pairs = zip(*(seconds[name][steady] for name in sides), strict=True)
    found["ratio"] = sorted(ours / theirs for ours, theirs in pairs)[len(seconds["clipkit"][steady]) // 2]
    if options.json:
        print(json.dumps(found))
        return
    for name in sides:
        row = found[name]
        print(f"{name:9s} {row['images_per_s']:7.0f} images/s   loss {row['loss']:.3f}   top-1 {row['top1']:.2%}")
    print(f"a step of clipkit's takes {found['ratio']:.2f} of open_clip's")


if __name__ == "__main__":
    main()
