"""A class head from 80 prompts a class, clipkit beside open_clip, in turns: `python benchmarks/class_head.py [--json]`.

ViT-B/32 with the same random weights on both sides, names of ImageNet's classes, the 80 templates of the CLIP
repository, all threads. open_clip's own builder takes ten classes at a time. The heads are compared. Every class costs
the same, so fewer of them (--classes) give the same ratio. open_clip is in the [parity] extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import clipkit
from clipkit.zeroshot.heads import class_head, ensembles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32").eval()
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        save_file(theirs.state_dict(), Path(folder) / "open_clip_model.safetensors")
        ours = clipkit.load(folder, "cpu")
    names = open_clip.IMAGENET_CLASSNAMES[: options.classes]
    templates, tokenizer = ensembles()["80"], open_clip.get_tokenizer("ViT-B-32")
    ratios, apart = [], 0.0
    for _ in range(options.rounds):
        began = time.perf_counter()
        mine = class_head(ours.model, ours.tokenizer, names, templates)
        between = time.perf_counter()
        other = open_clip.build_zero_shot_classifier(
            theirs, tokenizer, names, [t.replace("{}", "{0}").format for t in templates], num_classes_per_batch=10
        )
        ended = time.perf_counter()
        ratios.append((between - began) / (ended - between))
        apart = max(apart, float((mine - other.T).abs().max()))
    result = {
        "classes": options.classes,
        "templates": len(templates),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "largest_difference": apart,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{k:20s} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
