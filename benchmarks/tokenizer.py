"""Captions to token ids, clipkit beside open_clip, in turns: `python benchmarks/tokenizer.py [--json]`.

One process, one thread, CLIP's vocabulary, batches of 1,000 captions of 5 to 18 words: common words, and a long tail of
60,000 made-up ones, each side with an empty memory at the start of a round ("fresh") and with what it remembers of the
rounds before ("warm"). The ids are compared. open_clip pads to 77 ids, clipkit to the longest caption of the batch.
open_clip is in the [parity] extra.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch import Tensor

from clipkit.models.tokenizer import Tokenizer

WORDS = """
a photo of the dog cat man woman red blue car street city mountain lake old new vintage wooden table
with on in and under near beautiful sunset over beach children playing football stadium crowd
kitchen interior modern house garden wedding dress black white portrait illustration background
pattern logo set free stock image hotel room window view christmas tree lights snow winter landscape
river bridge night skyline clouds sky coffee cup breakfast food recipe pizza cake chocolate birthday
party UK 2019 2021 $15.99 1/4 HD 1080p Nikon D850 unbelievably photorealistic café
""".split()  # noqa: SIM905 - shorter than a list


def common_words(count: int) -> list[str]:
    """Captions of a hundred words."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(5, 18))) for _ in range(count)]


def long_tail(count: int) -> list[str]:
    """Captions of 60,000 made-up words, with Zipf's frequencies."""
    chance, letters = random.Random(0), "eeettaaoinnsshrdlucmfwypvbgkjqxz"
    words = ["".join(chance.choices(letters, k=chance.randint(3, 10))) for _ in range(60_000)]
    weights = list(accumulate(1 / (i + 1) for i in range(len(words))))
    return [" ".join(chance.choices(words, cum_weights=weights, k=chance.randint(5, 18))) for _ in range(count)]


def seconds(encode: Callable[[list[str]], Tensor], captions: list[str]) -> float:
    """CPU seconds of one pass, by batches of 1,000."""
    began = time.process_time()
    for i in range(0, len(captions), 1000):
        encode(captions[i : i + 1000])
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from open_clip import tokenizer as peer

    ours, theirs, rows = Tokenizer.clip(peer.default_bpe()), peer.SimpleTokenizer(), []
    empty = dict(theirs.cache)
    for name, captions in (
        ("common words", common_words(options.captions)),
        ("long tail", long_tail(options.captions)),
    ):
        a, b = ours(captions[:1000]), theirs(captions[:1000])
        same = torch.equal(a, b[:, : a.shape[1]]) and not b[:, a.shape[1] :].any()
        for memory in ("fresh", "warm"):
            found: dict[str, list[float]] = {"clipkit": [], "open_clip": []}
            for turn in range(options.rounds + 1):
                if memory == "fresh":
                    ours._words.clear()
                    theirs.cache = dict(empty)
                taken = {"clipkit": seconds(ours, captions), "open_clip": seconds(theirs, captions)}
                if turn:  # the first turn warms up
                    for side, value in taken.items():
                        found[side].append(value)
            row = {"captions": name, "memory": memory, "ids_equal": same}
            row |= {f"{side}_per_s": options.captions / statistics.median(v) for side, v in found.items()}
            pairs = zip(found["open_clip"], found["clipkit"], strict=True)
            row["ratio"] = statistics.median(b / a for b, a in pairs)
            rows.append(row)
            speeds = f"clipkit {row['clipkit_per_s']:,.0f}, open_clip {row['open_clip_per_s']:,.0f} captions/s"
            line = f"{name}, {memory}: {speeds}, ratio {row['ratio']:.1f}, ids equal: {same}"
            print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
