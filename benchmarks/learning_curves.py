"""Learning curves out of the logs of runs: `python benchmarks/learning_curves.py RUN... --out curves.png`.

A panel for each value that the logs hold (loss, zeroshot_top1 and so on, or those of `--of`), a line for each run that
has it, over the steps. A run is named by the last two parts of its folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clipkit import log
from clipkit.errors import UsageError

SHOWN = ("loss", "logit_scale", "zeroshot_top1", "samples_per_s")


def curves(runs: list[Path], wanted: tuple[str, ...]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Value -> run -> (step, value) of each line that has it. Raises UsageError for a folder without a log."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in runs:
        if not (run / "log.jsonl").is_file():
            raise UsageError(f"{run} has no log.jsonl; give the folders of runs")
        lines = log.read(run / "log.jsonl")
        for name in wanted:
            points = [(line["step"], float(line[name])) for line in lines if name in line]
            if points:
                found.setdefault(name, {})["/".join(run.resolve().parts[-2:])] = points
    return found


def figure(found: dict[str, dict[str, list[tuple[int, float]]]]) -> Any:
    """One row of panels."""
    sheet = Figure(figsize=(4.6 * len(found), 3.4), layout="constrained")
    for axes, (name, runs) in zip(sheet.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for run, points in runs.items():
            axes.plot(*zip(*points, strict=True), label=run, marker="o" if len(points) < 12 else None, linewidth=1.2)
        axes.set(xlabel="step", title=name)
        if name == "loss":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--of", nargs="+", default=SHOWN)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--json", action="store_true", help="print the curves instead of drawing them")
    options = parser.parse_args()
    try:
        found = curves(options.runs, tuple(options.of))
    except UsageError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"none of these runs has logged {', '.join(options.of)}")
    if options.json:
        print(json.dumps(found))
        return
    figure(found).savefig(options.out, dpi=110)
    print(options.out)


if __name__ == "__main__":
    main()
