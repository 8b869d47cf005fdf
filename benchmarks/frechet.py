"""The Frechet distance of 2048-dimensional features beside the matrix root that others take.

    python benchmarks/frechet.py [--json]

The same moments to both, in one run, in turns: ours through two symmetric eigenproblems, theirs as clean-fid and
pytorch-fid compute it, scipy.linalg.sqrtm of the product (needs the [parity] extra). Prints the medians and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from clipkit.guidance.metrics.distributions import Moments, frechet_distance


def by_matrix_root(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrtm(S1 S2)), with numpy and scipy."""
    from scipy.linalg import sqrtm

    one, other = a.covariance.numpy(), b.covariance.numpy()
    apart = (a.mean - b.mean).numpy()
    return float(apart @ apart + np.trace(one) + np.trace(other) - 2 * np.trace(np.real(sqrtm(one @ other))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    # Spectra that fall, as those of real features do.
    spread = torch.linspace(0, -3, options.dim, dtype=torch.float64).exp()
    sides = [torch.randn(options.pictures, options.dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    a, b = (Moments.of(side * spread) for side in sides)
    seconds: dict[str, list[float]] = {"clipkit": [], "sqrtm": []}
    values = {}
    implementations: dict[str, Callable[[Moments, Moments], float]] = {
        "clipkit": frechet_distance,
        "sqrtm": by_matrix_root,
    }
    for _ in range(options.repeat):
        for name, distance in implementations.items():
            began = time.perf_counter()
            values[name] = distance(a, b)
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "dim": options.dim,
        "threads": torch.get_num_threads(),
        "seconds": median["clipkit"],
        "seconds_sqrtm": median["sqrtm"],
        "ratio": median["clipkit"] / median["sqrtm"],
        "difference": abs(values["clipkit"] / values["sqrtm"] - 1),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{k:15s} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
