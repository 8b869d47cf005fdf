"""Export to ONNX and torch.export: a graph of the image encoder and one of the text encoder, without Python code.

They take the inputs of our models: uint8 pixels, and token ids padded to the context length that end with END.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from clipkit.convert.tokenizer_files import write_tokenizer
from clipkit.errors import UsageError
from clipkit.io import write_atomically
from clipkit.models.clip import CLIP
from clipkit.models.pretrained import Pretrained


class _Images(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> unit vectors [B, D]."""
        return self.model.encode_image(pixels)


class _Texts(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, context_length] -> unit vectors [B, D]."""
        return self.model.encode_text(ids)


def _programs(clip: Pretrained) -> dict[str, tuple[nn.Module, Tensor, str]]:
    size, length = clip.model.config.image_size, clip.model.config.context_length
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    ids = torch.full((2, length), clip.tokenizer.end_id)
    model = copy.deepcopy(clip.model).cpu().eval().to(memory_format=torch.contiguous_format)
    return {"image": (_Images(model).eval(), pixels, "pixels"), "text": (_Texts(model).eval(), ids, "ids")}


def write_programs(clip: Pretrained, out: Path, name: str = "") -> list[Path]:
    """image.pt2 and text.pt2 (torch.export.load reads them), with a free batch size -> the files written."""
    written = []
    for graph, (module, example, argument) in _programs(clip).items():
        batch = torch.export.Dim("batch", min=1, max=1 << 16)
        program = torch.export.export(module, (example,), dynamic_shapes={argument: {0: batch}})
        torch.export.save(program, out / f"{graph}.pt2")
        written.append(out / f"{graph}.pt2")
    return [*written, *_graph_files(clip, out)]


def write_onnx(clip: Pretrained, out: Path, name: str = "") -> list[Path]:
    """image.onnx and text.onnx, with a free batch size -> the files written. Raises UsageError without onnxscript."""
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError('ONNX graphs are made with onnxscript: pip install "clipkit[onnx]"') from None
    written = []
    for graph, (module, example, argument) in _programs(clip).items():
        torch.onnx.export(
            module,
            (example,),
            str(out / f"{graph}.onnx"),
            input_names=[argument],
            output_names=["features"],
            dynamic_shapes={argument: {0: torch.export.Dim("batch", min=1, max=1 << 16)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        written.append(out / f"{graph}.onnx")
    return [*written, *_graph_files(clip, out)]


def _graph_files(clip: Pretrained, out: Path) -> list[Path]:
    """Files beside the graphs: the tokenizer, and the numbers that preprocessing and scores need."""
    conventions = clip.model.config.conventions
    about = {
        "image_size": clip.model.config.image_size,
        "resize": conventions.image_resize,
        "fill": conventions.image_fill,
        "interpolation": conventions.image_interpolation,
        "context_length": clip.model.config.context_length,
        "end_id": clip.tokenizer.end_id,
        "pad_id": conventions.pad_id,
        "logit_scale": float(clip.model.logit_scale.detach()),
        "logit_bias": float(clip.model.logit_bias.detach()),
    }
    write_atomically(out / "clipkit.json", json.dumps(about, indent=2) + "\n")
    return [out / "clipkit.json", *write_tokenizer(clip.tokenizer, conventions, out)]
