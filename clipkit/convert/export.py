"""Our models for others: open_clip's folder, transformers' folder, ONNX graphs, torch.export programs.

The first two are read back by the libraries that they are for (and by clipkit.load), with equal features; the graphs
take what our models take: uint8 pixels, and token ids that end with END.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit import inputs
from clipkit._version import __version__
from clipkit.convert import onnx
from clipkit.convert.processors import CLIP_VOCABULARY, write_tokenizer
from clipkit.convert.weights import RESNETS, SIGLIP, VIT
from clipkit.errors import UsageError
from clipkit.io import write_atomically, written_whole
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.pretrained import Pretrained
from clipkit.models.tokenizer import Tokenizer

FORMATS = ("open_clip", "transformers", "onnx", "torch")

_TEXT = (
    (r"text\.tokens\.", "token_embedding."),
    (r"text\.positions$", "positional_embedding"),
    (r"text\.blocks\.(\d+)\.norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"text\.blocks\.(\d+)\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"text\.blocks\.(\d+)\.out\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"text\.blocks\.(\d+)\.mlp\.0\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"text\.blocks\.(\d+)\.mlp\.2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"text\.norm\.", "ln_final."),
    (r"log_logit_scale$", "logit_scale"),
)
_VIT = (
    (r"image\.trunk\.patch_embed\.proj\.", "visual.conv1."),
    (r"image\.trunk\.cls_token$", "visual.class_embedding"),
    (r"image\.trunk\.pos_embed$", "visual.positional_embedding"),
    (r"image\.trunk\.norm_pre\.", "visual.ln_pre."),
    (r"image\.trunk\.norm\.", "visual.ln_post."),
    (r"image\.trunk\.blocks\.(\d+)\.norm([12])\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"image\.trunk\.blocks\.(\d+)\.attn\.qkv\.", r"visual.transformer.resblocks.\1.attn.in_proj_"),
    (r"image\.trunk\.blocks\.(\d+)\.attn\.proj\.", r"visual.transformer.resblocks.\1.attn.out_proj."),
    (r"image\.trunk\.blocks\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"image\.trunk\.blocks\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
    (r"image\.trunk\.blocks\.(\d+)\.ls([12])\.", r"visual.transformer.resblocks.\1.ls_\2."),
)
_TIMM = (
    (r"image\.trunk\.", "visual.trunk."),
    (r"image\.projection\.(weight|bias)$", r"visual.head.proj.\1"),
    (r"image\.projection\.0\.", "visual.head.mlp.fc1."),
    (r"image\.projection\.2\.", "visual.head.mlp.fc2."),
)
_TRANSFORMERS = (
    (r"image\.trunk\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"image\.trunk\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"image\.trunk\.pos_embed$", "vision_model.embeddings.position_embedding.weight"),
    (r"image\.trunk\.norm_pre\.", "vision_model.pre_layrnorm."),
    (r"image\.trunk\.norm\.", "vision_model.post_layernorm."),
    (r"image\.trunk\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"image\.trunk\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv_proj."),
    (r"image\.trunk\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.out_proj."),
    (r"image\.trunk\.blocks\.(\d+)\.mlp\.fc([12])\.", r"vision_model.encoder.layers.\1.mlp.fc\2."),
    (r"image\.trunk\.attn_pool\.latent$", "vision_model.head.probe"),
    (r"image\.trunk\.attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
    (r"image\.trunk\.attn_pool\.norm\.", "vision_model.head.layernorm."),
    (r"image\.trunk\.attn_pool\.mlp\.", "vision_model.head.mlp."),
    (r"image\.trunk\.attn_pool\.(q|kv)\.", r"vision_model.head.attention.\1."),
    (r"image\.projection\.", "visual_projection."),
    (r"text\.tokens\.", "text_model.embeddings.token_embedding."),
    (r"text\.positions$", "text_model.embeddings.position_embedding.weight"),
    (r"text\.blocks\.(\d+)\.norm([12])\.", r"text_model.encoder.layers.\1.layer_norm\2."),
    (r"text\.blocks\.(\d+)\.qkv\.", r"text_model.encoder.layers.\1.self_attn.qkv_proj."),
    (r"text\.blocks\.(\d+)\.out\.", r"text_model.encoder.layers.\1.self_attn.out_proj."),
    (r"text\.blocks\.(\d+)\.mlp\.0\.", r"text_model.encoder.layers.\1.mlp.fc1."),
    (r"text\.blocks\.(\d+)\.mlp\.2\.", r"text_model.encoder.layers.\1.mlp.fc2."),
    (r"text\.norm\.", "text_model.final_layer_norm."),
    (r"log_logit_scale$", "logit_scale"),
)


def export(clip: Pretrained, out: Path, form: str, name: str = "") -> list[Path]:
    """Write the model into the folder `out` -> the files written.

    `out` is new or empty, or holds an earlier export in this format, whose place the new one takes. `name` is that
    under which it will be published; by default the folder's.
    Raises UsageError where the other library has no such architecture, and says which part of it; and for an `out`
    that holds something else, or cannot be written.
    """
    check_place(out, form)
    with written_whole(out) as aside:
        if form == "open_clip":
            files = _offering(lambda: _open_clip(clip, aside, name or out.name))
        elif form == "transformers":
            files = _offering(lambda: _transformers(clip, aside))
        else:
            files = (onnx.write_onnx if form == "onnx" else onnx.write_programs)(clip, aside)
    return [out / file.name for file in files]


def check_place(out: Path, form: str) -> None:
    """Check that `export` can write there, before the work. Raises UsageError."""
    if form not in FORMATS:
        raise UsageError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    (inputs.check_writable if _holds_export(out, form) else inputs.check_new)(out)


def _offering(write: Callable[[], list[Path]]) -> list[Path]:
    try:
        return write()
    except UsageError as error:
        raise UsageError(f"{error}; --format onnx and --format torch take every model") from None


_WEIGHTS = {"open_clip": "open_clip_model.safetensors", "transformers": "model.safetensors"}
_FILES = {
    "open_clip": ("open_clip_config.json",),
    "transformers": ("config.json", "preprocessor_config.json"),
    "onnx": ("image.onnx", "text.onnx", "clipkit.json"),
    "torch": ("image.pt2", "text.pt2", "clipkit.json"),
}
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")


def _holds_export(out: Path, form: str) -> bool:
    """Whether a folder holds what was exported by clipkit in this format, and nothing else."""
    from safetensors import SafetensorError, safe_open

    weights = _WEIGHTS.get(form, "clipkit.json")
    if not os.path.isfile(out / weights) or {p.name for p in out.iterdir()} - {weights, *_FILES[form], *_BESIDE}:
        return False
    try:
        if form in _WEIGHTS:
            with safe_open(out / weights, framework="pt") as file:
                return "clipkit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
    return True


def _renamed(tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            renamed, hits = re.subn(f"^{pattern}", replacement, name)
            if hits:
                break
        else:
            renamed = name
        found[renamed] = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
    return found


def _save(path: Path, tensors: Mapping[str, Tensor], clip: Pretrained) -> Path:
    from safetensors.torch import save

    about = {"format": "pt", "clipkit": __version__, "activation": clip.model.config.conventions.text_activation}
    write_atomically(path, save({k: t.contiguous() for k, t in tensors.items()}, metadata=about))
    return path


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


# open_clip


def _open_clip(clip: Pretrained, out: Path, name: str) -> list[Path]:
    config, how = clip.model.config, clip.model.config.conventions
    vision, rules = _open_clip_vision(clip.model)
    tensors = _renamed(clip.model.state_dict(), (*rules, *_TEXT))
    if "visual.proj" in tensors:
        tensors["visual.proj"] = tensors["visual.proj"].T
        tensors["visual.class_embedding"] = tensors["visual.class_embedding"].flatten()
        tensors["visual.positional_embedding"] = tensors["visual.positional_embedding"][0]
    projection = tensors.pop("text.projection.weight")
    if how.text_projection_bias:
        tensors["text_projection.weight"] = projection
        tensors["text_projection.bias"] = tensors.pop("text.projection.bias")
    else:
        tensors["text_projection"] = projection.T
    text: dict[str, Any] = {
        "context_length": config.context_length,
        "vocab_size": len(clip.model.text.tokens.weight),
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "no_causal_mask": how.text_attention == "full",
        "proj_bias": how.text_projection_bias,
        "norm_kwargs": {"eps": how.text_norm_eps},
        "pool_type": "last" if how.text_pool == "last" else "eos",
        "eos_id": clip.tokenizer.end_id,
        "pad_id": how.pad_id,
    }
    if how.text_mlp_width:
        text["mlp_ratio"] = (how.text_mlp_width + 0.5) / config.text_width
    if how.text_activation == "gelu_tanh":
        text["act_kwargs"] = {"approximate": "tanh"}
    if how.text_cleaning not in _CLEANINGS:
        raise UsageError(f"open_clip does not clean captions in the way {how.text_cleaning!r}, as this model wants it")
    if not (isinstance(clip.tokenizer, Tokenizer) and clip.tokenizer.vocab_size == CLIP_VOCABULARY):
        text |= {"hf_tokenizer_name": name, "tokenizer_kwargs": {"clean": _CLEANINGS[how.text_cleaning]}}
    model: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if how.text_activation == "quick_gelu":
        model["quick_gelu"] = True
    if "logit_bias" in tensors:
        model["init_logit_bias"] = float(tensors["logit_bias"].detach())
    seen = {
        "mean": list(how.image_mean),
        "std": list(how.image_std),
        "interpolation": how.image_interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash", "pad": "longest"}[how.image_resize],
        "fill_color": how.image_fill,
    }
    written = _write_json(out / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": seen})
    weights = _save(out / "open_clip_model.safetensors", tensors, clip)
    return [written, weights, *write_tokenizer(clip.tokenizer, how, out)]


_CLEANINGS = {"clip": "lower", "canonical": "canonicalize", "whitespace": "whitespace"}
"""Our names for what is done to captions -> open_clip's."""


def _open_clip_vision(model: CLIP) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    config, how = model.config, model.config.conventions
    arguments = dict(config.image_kwargs)
    native = (VIT, *RESNETS.values())
    if config.image_tower == VIT and how.image_projection == "linear":
        if arguments.pop("act_layer", "gelu") != how.text_activation:
            raise UsageError("open_clip's own ViT has one activation for both towers; this model has two")
        return _open_clip_vit(model), (*_VIT, (r"image\.projection\.weight$", "visual.proj"))
    if config.image_tower in native:
        raise UsageError(f"export of {config.image_tower} with {how.image_projection} projection is not supported")
    if unknown := set(arguments) - {"global_pool"}:
        raise UsageError(f"open_clip makes timm towers by their name; it cannot be told image_kwargs.{min(unknown)}")
    _check_default_shape(model)
    return {
        "timm_model_name": config.image_tower,
        "timm_model_pretrained": False,
        "timm_pool": arguments.get("global_pool", ""),
        "timm_proj": "linear" if how.image_projection == "bias" else how.image_projection,
        "timm_proj_bias": how.image_projection == "bias",
        "image_size": config.image_size,
    }, _TIMM


def _open_clip_vit(model: CLIP) -> dict[str, Any]:
    arguments = model.config.image_kwargs
    shape: dict[str, Any] = {
        "image_size": model.config.image_size,
        "layers": arguments["depth"],
        "width": arguments["embed_dim"],
        "head_width": arguments["embed_dim"] // arguments["num_heads"],
        "patch_size": arguments["patch_size"],
        "mlp_ratio": arguments.get("mlp_ratio", 4.0),
    }
    if not arguments.get("pre_norm", True):
        shape["no_ln_pre"] = True
    if "init_values" in arguments:
        shape["ls_init_value"] = arguments["init_values"]
    return shape


def _check_default_shape(model: CLIP) -> None:
    """timm makes the tower for its own image size; where that shows in the weights, ours must be the same."""
    import timm

    name = model.config.image_tower
    if not timm.is_model(name):
        raise UsageError(f"open_clip has no image tower {name}; its towers are OpenAI's and timm's")
    default = timm.create_model(name, pretrained=False, num_classes=0)
    ours = model.image.trunk.state_dict()
    for key, tensor in default.state_dict().items():
        if key in ours and ours[key].shape != tensor.shape:
            size = model.config.image_size
            raise UsageError(f"open_clip makes {name} for its usual image size; at {size} pixels {key} differs")


# transformers


def _transformers(clip: Pretrained, out: Path) -> list[Path]:
    config, how = clip.model.config, clip.model.config.conventions
    siglip = config.image_tower == SIGLIP and how.text_attention == "full" and how.image_projection == "none"
    if not siglip and (config.image_tower != VIT or how.text_attention != "causal" or how.text_projection_bias):
        raise UsageError(f"transformers has CLIP with OpenAI's ViT, and SigLIP; not with {config.image_tower}")
    if not siglip and {"pre_norm", "init_values"} & set(config.image_kwargs):
        raise UsageError("transformers' CLIP has a norm before the first block and no layer scale; this model differs")
    if how.image_resize == "pad":
        raise UsageError("this model pads pictures to a square; transformers' processors of CLIP and SigLIP do not")
    return [
        _write_json(out / "config.json", _transformers_config(clip, siglip)),
        _write_json(out / "preprocessor_config.json", _transformers_preprocessing(config, siglip)),
        _save(out / "model.safetensors", _transformers_tensors(clip.model, siglip), clip),
        *write_tokenizer(clip.tokenizer, how, out),
    ]


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _transformers_config(clip: Pretrained, siglip: bool) -> dict[str, Any]:
    config, how, arguments = clip.model.config, clip.model.config.conventions, clip.model.config.image_kwargs
    vision = {
        "hidden_size": arguments["embed_dim"],
        "intermediate_size": int(arguments["embed_dim"] * arguments.get("mlp_ratio", 4)),
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "patch_size": arguments["patch_size"],
        "image_size": config.image_size,
        "hidden_act": _ACTIVATIONS[arguments.get("act_layer", "gelu")],
        "layer_norm_eps": 1e-6 if siglip else 1e-5,
    }
    text = {
        "hidden_size": config.text_width,
        "intermediate_size": how.text_mlp_width or 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "vocab_size": len(clip.model.text.tokens.weight),
        "hidden_act": _ACTIVATIONS[how.text_activation],
        "layer_norm_eps": how.text_norm_eps,
        "eos_token_id": clip.tokenizer.end_id,
        "bos_token_id": clip.tokenizer.start_id if isinstance(clip.tokenizer, Tokenizer) else None,
        "pad_token_id": how.pad_id,
    }
    sections = {"vision_config": vision, "text_config": text}
    if siglip:
        return {"model_type": "siglip", "architectures": ["SiglipModel"], **sections}
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config.embed_dim, **sections}


def _transformers_preprocessing(config: CLIPConfig, siglip: bool) -> dict[str, Any]:
    how, square = config.conventions, {"height": config.image_size, "width": config.image_size}
    crop = how.image_resize == "crop"
    return {
        # SigLIP's own does not crop.
        "image_processor_type": "SiglipImageProcessor" if siglip and not crop else "CLIPImageProcessor",
        "size": {"shortest_edge": config.image_size} if crop else square,
        "crop_size": square,
        "do_center_crop": crop,
        "resample": 2 if how.image_interpolation == "bilinear" else 3,
        "image_mean": list(how.image_mean),
        "image_std": list(how.image_std),
    }


def _transformers_tensors(model: CLIP, siglip: bool) -> dict[str, Tensor]:
    head = "text_model.head." if siglip else "text_projection."
    tensors = _renamed(model.state_dict(), (*_TRANSFORMERS, (r"text\.projection\.", head)))
    if siglip:
        for kind in ("weight", "bias"):
            q, kv = (tensors.pop(f"vision_model.head.attention.{p}.{kind}") for p in ("q", "kv"))
            tensors[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([q, kv])
        tensors |= {k: tensors[k].reshape(1) for k in ("logit_scale", "logit_bias")}
    else:
        token = "vision_model.embeddings.class_embedding"
        tensors[token] = tensors[token].flatten()
    position = "vision_model.embeddings.position_embedding.weight"
    tensors[position] = tensors[position][0]
    return _split(tensors)


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as three matrices."""
    found = {}
    for name, tensor in tensors.items():
        if ".qkv_proj." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv_proj.", f".{part}_proj.")] = piece
        else:
            found[name] = tensor
    return found
