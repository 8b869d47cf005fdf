"""Peak memory of the loss, forward and backward, beside the plain formula: `python benchmarks/loss_memory.py [--json]`.

The figure is the growth of a process's peak resident memory, less the gradients of the features (which any loss must
return). Each figure is from a separate process, after a warm-up on a small batch; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

DIMENSION = 512
PLAIN_LIMIT = 10_000  # the plain formula needs 12 GiB at B = 32,768


def peak_mib(name: str, batch: int) -> tuple[float, float]:
    """MiB of extra memory and seconds, measured in this process."""
    import torch
    import torch.nn.functional as F

    from clipkit.train.losses import info_nce, sigmoid_loss

    def plain(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits, labels = scale * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def sigmoid(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return sigmoid_loss(image, text, scale, torch.tensor(-10.0))

    loss = {"plain": plain, "info_nce": info_nce, "sigmoid": sigmoid}[name]

    def run(size: int) -> tuple[float, float]:
        tensors = [F.normalize(torch.randn(size, DIMENSION), dim=1).requires_grad_() for _ in range(2)]
        scale = torch.tensor(14.0, requires_grad=True)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, began = _memory("VmRSS"), time.perf_counter()
        gradients = torch.autograd.grad(loss(*tensors, scale), [*tensors, scale])
        elapsed, returned = time.perf_counter() - began, sum(g.nbytes for g in gradients)
        return (_memory("VmHWM") - before - returned) / 2**20, elapsed

    run(64)
    return run(batch)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--one", nargs=2, metavar=("LOSS", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak_mib(options.one[0], int(options.one[1]))))
        return
    # A fixed threshold: every large block is mapped, and given back, by itself.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    for batch in options.batches:
        for name in ("plain", "info_nce", "sigmoid"):
            if name == "plain" and batch > PLAIN_LIMIT:
                continue
            command = [sys.executable, __file__, "--one", name, str(batch)]
            mib, seconds = json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)
            rows.append({"loss": name, "batch": batch, "dimension": DIMENSION, "peak_mib": mib, "seconds": seconds})
            if not options.json:
                print(f"B = {batch:6d}  {name:9s} {mib:8.1f} MiB  {seconds:6.2f} s", flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
