"""OpenAI's CLIP files, which have no configuration: the shape of the model is read from its tensors."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from clipkit.convert.open_clip import from_open_clip
from clipkit.convert.renaming import Tensors, need
from clipkit.models.clip import CLIPConfig


def is_openai(tensors: Tensors) -> bool:
    """Whether these are tensors of OpenAI's own files, which need no configuration: they hold their sizes as well."""
    return {"input_resolution", "context_length", "vocab_size"} <= set(tensors)


def _layers(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def from_openai(tensors: Tensors) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """openai/CLIP's state dict; its shape is read from its tensors (model.py, build_model), and its GELU is quick."""
    width = need(tensors, "ln_final.weight").shape[0]
    config = {
        "embed_dim": need(tensors, "text_projection").shape[1],
        "quick_gelu": True,
        "text_cfg": {
            "context_length": need(tensors, "positional_embedding").shape[0],
            "vocab_size": need(tensors, "token_embedding.weight").shape[0],
            "width": width,
            "heads": width // 64,
            "layers": _layers(tensors, r"transformer\.resblocks\.(\d+)\."),
        },
        "vision_cfg": _vit(tensors) if "visual.proj" in tensors else _resnet(tensors),
    }
    return from_open_clip({"model_cfg": config}, tensors)


def _vit(tensors: Tensors) -> dict[str, Any]:
    patches = need(tensors, "visual.conv1.weight")
    grid = round((need(tensors, "visual.positional_embedding").shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "width": patches.shape[0],
        "layers": _layers(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
    }


def _resnet(tensors: Tensors) -> dict[str, Any]:
    grid = round((need(tensors, "visual.attnpool.positional_embedding").shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "width": need(tensors, "visual.layer1.0.conv1.weight").shape[0],
        "layers": [_layers(tensors, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)],
    }
