"""Search in 100,000 pictures: seconds beyond the encoding of the query: `python benchmarks/search.py [--json]`.

Random unit vectors of 512 numbers, as `clipkit index` writes them (float16, memory-mapped), in the page cache; the
median over queries, exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from clipkit.zeroshot.index import PART, Index


def write(folder: Path, count: int, dim: int) -> None:
    """An index of random vectors."""
    generator = torch.Generator().manual_seed(0)
    about = {"format": 1, "source": "", "model": "", "weights": "", "dim": dim, "count": count, "part_size": PART}
    (folder / "index.json").write_text(json.dumps(about))
    for part, start in enumerate(range(0, count, PART)):
        rows = list(range(start, min(start + PART, count)))
        vectors = F.normalize(torch.randn(len(rows), dim, generator=generator), dim=1).half()
        np.save(folder / f"part-{part:05d}.npy", vectors.numpy())
        labels = {"rows": rows, "keys": [f"{row}.jpg" for row in rows], "skipped": {}}
        (folder / f"part-{part:05d}.json").write_text(json.dumps(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=21)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.count, 512)
        index, taken = Index(folder), []
        for i in range(options.queries + 3):
            query = F.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(i)), dim=1)
            began = time.perf_counter()
            index.search(query, 12)
            if i >= 3:  # the first ones fill the page cache and read the keys
                taken.append(time.perf_counter() - began)
    result = {
        "pictures": options.count,
        "threads": torch.get_num_threads(),
        "milliseconds": 1000 * statistics.median(taken),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{k:15s} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
