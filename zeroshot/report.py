"""Zero-shot results as one self-contained HTML page: accuracies, confusion matrices, and the worst classes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipkit._version import __version__
from clipkit.data.files import counted
from clipkit.io import write_atomically
from clipkit.zeroshot.classify import confusions
from clipkit.zeroshot.evaluation import Result, cells

_WORST, _EXAMPLES, _PAIRS, _THUMBNAIL = 8, 6, 10, 96
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem .25rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 .6rem .6rem 0; vertical-align: top; width: 7rem; font-size: .8rem }
figure img { width: 96px; height: 96px; object-fit: contain; background: #f4f4f4 }
img.matrix { image-rendering: pixelated; width: 24rem; max-width: 100%; border: 1px solid #ddd }
.columns { display: flex; flex-wrap: wrap; gap: 2rem } .muted { color: #777 }
"""


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write index.html into `folder` -> its path. It needs no network and no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = "\n".join(_section(result) for result in results)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Zero-shot results</title><style>{_STYLE}</style></head><body>
<h1>Zero-shot results</h1>
{_overview(results)}
{_bars(results)}
{sections}
<p class="muted">clipkit {__version__}</p>
</body></html>
"""
    path = folder / "index.html"
    write_atomically(path, page)
    return path


def _overview(results: Sequence[Result]) -> str:
    titles, *rows = cells(results)
    heads = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(
        f"<tr><td>{html.escape(model)}</td><td>{html.escape(name)}</td>"
        + "".join(f'<td class="number">{cell}</td>' for cell in scores)
        + "</tr>"
        for model, name, *scores in rows
    )
    return f'<table id="overview"><tr>{heads}</tr>{body}</table>'


def _bars(results: Sequence[Result]) -> str:
    """Bar chart of the top-1 accuracies with their intervals, as SVG."""
    height, left, wide = 24, 260, 400
    marks = []
    for i, r in enumerate(results):
        y, s = i * height, r.scores
        label = html.escape(f"{Path(r.model).name or r.model} on {r.images.name}"[-40:])
        low, high = left + s.top1_low * wide, left + s.top1_high * wide
        marks.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{label}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{s.top1 * wide:.1f}" height="{height - 8}" fill="#4a7fb5"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 12}" y2="{y + 12}" stroke="#222"/>'
            f'<text x="{high + 6:.1f}" y="{y + 16}">{s.top1:.1%}</text>'
        )
    size = f'width="{left + wide + 70}" height="{height * len(results) + 4}"'
    return f'<svg id="bars" {size} font-size="13" font-family="system-ui, sans-serif">{"".join(marks)}</svg>'


def _section(result: Result) -> str:
    matrix = confusions(result.predictions)
    title = html.escape(f"{result.images.name}, {result.model}")
    skipped = f"; skipped: {html.escape(counted(result.skipped))}" if result.skipped else ""
    return f"""<section><h2>{title}</h2>
<p>{result.scores.n:,} images, {len(result.images.classes)} classes, {result.templates} templates{skipped}.</p>
<div class="columns"><div><h3>Confusion matrix</h3>{_matrix_picture(matrix)}
<p class="muted">Rows are true classes, columns predicted classes, in the order of the class list; dark is frequent.</p>
</div><div><h3>Most frequent confusions</h3>{_pairs(result, matrix)}</div></div>
<h3>Worst classes</h3>{_worst(result, matrix)}</section>"""


def _name(result: Result, index: int) -> str:
    return html.escape(result.images.classes[index][0])


def _matrix_picture(matrix: Tensor) -> str:
    """The matrix, normalised by row, as grey levels of its square root, which makes rare confusions visible."""
    share = matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    grey = (255 * (1 - share.sqrt())).round().to(torch.uint8)
    picture = Image.fromarray(grey.numpy())
    scale = max(1, 384 // len(matrix))
    picture = picture.resize((len(matrix) * scale,) * 2, Image.Resampling.NEAREST)
    return f'<img class="matrix" alt="confusion matrix" src="{_data_uri(picture)}">'


def _pairs(result: Result, matrix: Tensor) -> str:
    wrong = matrix.clone().fill_diagonal_(0)
    counts, places = wrong.flatten().topk(min(_PAIRS, wrong.numel()))
    rows = "".join(
        f"<tr><td>{_name(result, place // len(matrix))}</td><td>{_name(result, place % len(matrix))}</td>"
        f'<td class="number">{count}</td></tr>'
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    )
    return f"<table><tr><th>class</th><th>predicted</th><th>images</th></tr>{rows}</table>"


def _worst(result: Result, matrix: Tensor) -> str:
    totals = matrix.sum(dim=1)
    recall = matrix.diagonal() / totals.clamp(min=1)
    order = torch.where(totals > 0, recall, 2.0).argsort()[: min(_WORST, int((totals > 0).sum()))]
    parts = []
    for c in order.tolist():
        targets, first = result.predictions.targets, result.predictions.ranking[:, 0]
        wrong = ~targets.gather(1, first[:, None])[:, 0]
        missed = (targets[:, c] & wrong).nonzero()[:_EXAMPLES, 0].tolist()
        shown = "".join(
            f'<figure><img alt="" src="{_data_uri(_thumbnail(result.images[i][0]))}">'
            f"<figcaption>{_name(result, int(first[i]))}</figcaption></figure>"
            for i in missed
        )
        parts.append(f"<h4>{_name(result, c)}: {float(recall[c]):.0%} of {int(totals[c])}</h4><div>{shown}</div>")
    return "\n".join(parts)


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
