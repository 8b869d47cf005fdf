"""Everyone's weights -> ours: names of tensors, and the shape and conventions of the model that they belong to.

Three layouts: OpenAI's, which open_clip keeps for its own towers; open_clip's around a timm tower; transformers' CLIP
and SigLIP. Each is a table from their names to ours, and a function that reads the model's shape from their
configuration, or, where there is none (OpenAI), from the tensors themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipkit.convert.processors import (
    CLIP_VOCABULARY,
    TokenizerFiles,
    open_clip_pictures,
    padding,
    siglip_cleaning,
    square,
    transformers_pictures,
)
from clipkit.errors import CheckpointError
from clipkit.io import only_known
from clipkit.models.clip import CLIPConfig, Conventions

Tensors = Mapping[str, Tensor]
Rule = tuple[Any, ...]  # pattern, replacement, and for some what is done to the tensor

VIT = "vit_base_patch16_clip_224"  # timm's ViT with CLIP's extra norm; its sizes are given as arguments
SIGLIP = "vit_base_patch16_siglip_224"


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def _unsqueezed(tensor: Tensor) -> Tensor:
    return tensor[None]


def _scalar(tensor: Tensor) -> Tensor:
    return tensor.reshape(())


def _attention(theirs: str, qkv: str, out: str) -> list[Rule]:
    return [(theirs + r"attn\.in_proj_(weight|bias)$", qkv + r".\2"), (theirs + r"attn\.out_proj\.", out + ".")]


_SCALES: list[Rule] = [(r"logit_scale$", "log_logit_scale", _scalar), (r"logit_bias$", "logit_bias", _scalar)]

_OPENAI_VIT: list[Rule] = [
    (r"visual\.conv1\.", "image.trunk.patch_embed.proj."),
    (r"visual\.class_embedding$", "image.trunk.cls_token", lambda t: t[None, None]),
    (r"visual\.positional_embedding$", "image.trunk.pos_embed", _unsqueezed),
    (r"visual\.ln_pre\.", "image.trunk.norm_pre."),
    (r"visual\.ln_post\.", "image.trunk.norm."),
    (r"visual\.proj$", "image.projection.weight", _transposed),
    *_attention(
        r"visual\.transformer\.resblocks\.(\d+)\.",
        r"image.trunk.blocks.\1.attn.qkv",
        r"image.trunk.blocks.\1.attn.proj",
    ),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"image.trunk.blocks.\1.norm\2."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"image.trunk.blocks.\1.mlp.fc1."),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"image.trunk.blocks.\1.mlp.fc2."),
    (r"visual\.transformer\.resblocks\.(\d+)\.ls_([12])\.", r"image.trunk.blocks.\1.ls\2."),
]

_OPENAI_RESNET: list[Rule] = [
    (r"visual\.conv(\d)\.", r"image.trunk.stem.conv\1.conv."),
    (r"visual\.bn(\d)\.", r"image.trunk.stem.conv\1.bn."),
    *(
        (rf"visual\.layer{i + 1}\.(\d+)\.{theirs}{j + 1}\.", rf"image.trunk.stages.{i}.\1.{conv}.{ours}.")
        for i in range(4)
        for j, conv in enumerate(("conv1_1x1", "conv2_kxk", "conv3_1x1"))
        for theirs, ours in (("conv", "conv"), ("bn", "bn"))
    ),
    *(
        (rf"visual\.layer{i + 1}\.(\d+)\.downsample\.{j}\.", rf"image.trunk.stages.{i}.\1.shortcut.conv.{ours}.")
        for i in range(4)
        for j, ours in enumerate(("conv", "bn"))
    ),
    (r"visual\.attnpool\.positional_embedding$", "image.trunk.head.pos_embed"),
    (r"visual\.attnpool\.([qkv])_proj\.", r"image.trunk.head.\1."),
    (r"visual\.attnpool\.c_proj\.", "image.projection."),
]

_OPENAI_TEXT: list[Rule] = [
    (r"(?:text\.)?token_embedding\.", "text.tokens."),
    (r"(?:text\.)?positional_embedding$", "text.positions"),
    *_attention(r"(?:text\.)?transformer\.resblocks\.(\d+)\.", r"text.blocks.\1.qkv", r"text.blocks.\1.out"),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.ln_([12])\.", r"text.blocks.\1.norm\2."),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text.blocks.\1.mlp.0."),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text.blocks.\1.mlp.2."),
    (r"(?:text\.)?ln_final\.", "text.norm."),
    (r"(?:text\.)?text_projection$", "text.projection.weight", _transposed),
    (r"(?:text\.)?text_projection\.", "text.projection."),
]

_OPEN_CLIP_TIMM: list[Rule] = [
    (r"visual\.trunk\.", "image.trunk."),
    (r"visual\.head\.proj\.", "image.projection."),
    (r"visual\.head\.mlp\.fc1\.", "image.projection.0."),
    (r"visual\.head\.mlp\.fc2\.", "image.projection.2."),
]

_TRANSFORMERS: list[Rule] = [
    (r"vision_model\.embeddings\.patch_embedding\.", "image.trunk.patch_embed.proj."),
    (r"vision_model\.embeddings\.class_embedding$", "image.trunk.cls_token", lambda t: t[None, None]),
    (r"vision_model\.embeddings\.position_embedding\.weight$", "image.trunk.pos_embed", _unsqueezed),
    (r"vision_model\.pre_layrnorm\.", "image.trunk.norm_pre."),
    (r"vision_model\.post_layernorm\.", "image.trunk.norm."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"image.trunk.blocks.\1.attn.qkv."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"image.trunk.blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image.trunk.blocks.\1.norm\2."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.fc([12])\.", r"image.trunk.blocks.\1.mlp.fc\2."),
    (r"vision_model\.head\.probe$", "image.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.(q|kv)\.", r"image.trunk.attn_pool.\1."),
    (r"vision_model\.head\.attention\.out_proj\.", "image.trunk.attn_pool.proj."),
    (r"vision_model\.head\.layernorm\.", "image.trunk.attn_pool.norm."),
    (r"vision_model\.head\.mlp\.", "image.trunk.attn_pool.mlp."),
    (r"visual_projection\.", "image.projection."),
    (r"text_model\.embeddings\.token_embedding\.", "text.tokens."),
    (r"text_model\.embeddings\.position_embedding\.weight$", "text.positions"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"text.blocks.\1.qkv."),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"text.blocks.\1.out."),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"text.blocks.\1.norm\2."),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"text.blocks.\1.mlp.0."),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"text.blocks.\1.mlp.2."),
    (r"text_model\.final_layer_norm\.", "text.norm."),
    (r"text_model\.head\.", "text.projection."),
    (r"text_projection\.", "text.projection."),
    *_SCALES,
]

# Not weights: sizes that OpenAI stores as tensors, and numbers that are computed.
_IGNORED = re.compile(
    r"input_resolution|context_length|vocab_size|.*\.position_ids|(.*\.)?attn_mask|.*\.num_batches_tracked"
)


def translate(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their tensors under our names, in float32. Raises CheckpointError naming those that no rule knows."""
    found: dict[str, Tensor] = {}
    strangers = []
    for name, tensor in tensors.items():
        for pattern, replacement, *change in rules:
            renamed, hits = re.subn(f"^{pattern}", replacement, name, count=1)
            if hits:
                found[renamed] = change[0](tensor) if change else tensor
                break
        else:
            if not _IGNORED.fullmatch(name):
                strangers.append(name)
    if strangers:
        raise CheckpointError(f"{len(strangers)} tensors belong to another architecture: {', '.join(strangers[:3])}")
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def _need(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"there is no tensor {name!r}; the file is cut, or of another architecture")
    return tensors[name]


def _layers(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def is_openai(tensors: Tensors) -> bool:
    """Whether these are tensors of OpenAI's own files, which need no configuration: they hold their sizes as well."""
    return {"input_resolution", "context_length", "vocab_size"} <= set(tensors)


def is_transformers(tensors: Tensors) -> bool:
    """Whether these are named as transformers names them."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in tensors)


def from_openai(tensors: Tensors) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """openai/CLIP's state dict; its shape is read from its tensors (model.py, build_model), and its GELU is quick."""
    width = _need(tensors, "ln_final.weight").shape[0]
    config = {
        "embed_dim": _need(tensors, "text_projection").shape[1],
        "quick_gelu": True,
        "text_cfg": {
            "context_length": _need(tensors, "positional_embedding").shape[0],
            "vocab_size": _need(tensors, "token_embedding.weight").shape[0],
            "width": width,
            "heads": width // 64,
            "layers": _layers(tensors, r"transformer\.resblocks\.(\d+)\."),
        },
        "vision_cfg": _openai_vit(tensors) if "visual.proj" in tensors else _openai_resnet(tensors),
    }
    return from_open_clip({"model_cfg": config}, tensors)


def _openai_vit(tensors: Tensors) -> dict[str, Any]:
    patches = _need(tensors, "visual.conv1.weight")
    grid = round((_need(tensors, "visual.positional_embedding").shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * patches.shape[-1],
        "patch_size": patches.shape[-1],
        "width": patches.shape[0],
        "layers": _layers(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
    }


def _openai_resnet(tensors: Tensors) -> dict[str, Any]:
    grid = round((_need(tensors, "visual.attnpool.positional_embedding").shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "width": _need(tensors, "visual.layer1.0.conv1.weight").shape[0],
        "layers": [_layers(tensors, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)],
    }


# What the fields of open_clip's CLIPVisionCfg and CLIPTextCfg do here: read, with their defaults; built in; no effect.
_VISION: dict[str, Any] = {
    "image_size": None, "layers": None, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": None,
    "no_ln_pre": False, "ls_init_value": None,
    "timm_model_name": None, "timm_pool": None, "timm_proj": None, "timm_proj_bias": False,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "no_causal_mask": False, "pool_type": "argmax", "eos_id": 2, "proj_bias": False, "act_kwargs": None,
    "norm_kwargs": None, "pad_id": None, "tokenizer_kwargs": None, "hf_tokenizer_name": None,
}  # fmt: skip
_NO: Sequence[Any] = (False, None)
_NOTHING: Sequence[Any] = (None, {})
_BUILT_IN: dict[str, Sequence[Any]] = {
    "block_type": (None, "default"), "qk_norm": _NO, "scaled_cosine_attn": _NO, "scale_heads": _NO,
    "scale_attn_inner": _NO, "scale_attn": _NO, "scale_fc": _NO, "final_ln_after_pool": _NO, "output_tokens": _NO,
}  # fmt: skip
_VISION_BUILT_IN: dict[str, Sequence[Any]] = {
    **_BUILT_IN, "attentional_pool": _NO, "pos_embed_type": ("learnable",), "pool_type": ("tok",),
    "act_kwargs": _NOTHING, "norm_kwargs": _NOTHING,
}  # fmt: skip
_TEXT_BUILT_IN: dict[str, Sequence[Any]] = {
    **_BUILT_IN, "embed_cls": _NO, "proj_type": ("linear",), "ls_init_value": (None,), "hf_model_name": (None, ""),
    "tokenizer_mode": (None, ""),
}  # fmt: skip
_VISION_FREE = {
    "patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_drop", "timm_drop_path"
}  # fmt: skip
_TEXT_FREE = {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_MODEL_FREE = {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype", "output_dict"}
_CLIPS = TokenizerFiles()


def from_open_clip(
    config: Mapping[str, Any], tensors: Tensors, files: TokenizerFiles = _CLIPS
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """An open_clip_config.json, the state dict beside it, and the tokenizer that lies there.

    Raises CheckpointError for architectures that are not supported (text towers of transformers, CoCa, attentional
    pooling), for anything in the configuration that is not known here, and for tensors of another architecture.
    """
    whole = config if "model_cfg" in config else {"model_cfg": config, "preprocess_cfg": config.get("preprocess_cfg")}
    whole = only_known(whole, "", {"model_cfg": None, "preprocess_cfg": None})
    model = only_known(
        {key: value for key, value in whole["model_cfg"].items() if key != "preprocess_cfg"},
        "model_cfg",
        {"embed_dim": 0, "quick_gelu": False, "init_logit_bias": None, "vision_cfg": {}, "text_cfg": {}},
        {"multimodal_cfg": (None,)},
        _MODEL_FREE,
    )
    if not model["embed_dim"]:
        raise CheckpointError("model_cfg has no embed_dim")
    vision = only_known(model["vision_cfg"], "vision_cfg", _VISION, _VISION_BUILT_IN, _VISION_FREE)
    text = only_known(model["text_cfg"], "text_cfg", _TEXT, _TEXT_BUILT_IN, _TEXT_FREE)
    activation = _open_clip_activation(model, text)
    full = text["no_causal_mask"]
    conventions = Conventions(
        text_activation=activation,
        text_norm_eps=only_known(text["norm_kwargs"] or {}, "text_cfg.norm_kwargs", {"eps": 1e-5})["eps"],
        text_mlp_width=0 if text["mlp_ratio"] == 4 else int(text["width"] * text["mlp_ratio"]),
        text_attention="full" if full else "causal",
        text_pool=_open_clip_pool(text, files),
        text_projection_bias=text["proj_bias"],
        text_cleaning=_open_clip_cleaning(text, files),
        # open_clip's own tokenizer fills with zeros; text_cfg.pad_id is for CoCa's mask.
        pad_id=padding(files, text["pad_id"], "text_cfg.pad_id") if full and text["hf_tokenizer_name"] else 0,
        **open_clip_pictures(whole["preprocess_cfg"] or {}),
    )
    shape = CLIPConfig(
        image_size=224 if vision["image_size"] is None else square(vision["image_size"], "vision_cfg.image_size"),
        embed_dim=model["embed_dim"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        init_logit_bias=None if model["init_logit_bias"] is None and "logit_bias" not in tensors else 0.0,
        conventions=conventions,
    )
    if vision["timm_model_name"]:
        return _open_clip_timm(shape, vision, tensors)
    if isinstance(vision["layers"], (list, tuple)):
        return _open_clip_resnet(shape, vision, tensors)
    return _open_clip_vit(shape, vision, activation, tensors)


def _open_clip_activation(model: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    asked = text["act_kwargs"] or {"approximate": "none"}
    if model["quick_gelu"] and not text["act_kwargs"]:
        return "quick_gelu"
    if model["quick_gelu"] or asked not in ({"approximate": "none"}, {"approximate": "tanh"}):
        raise CheckpointError(
            f"text_cfg.act_kwargs {text['act_kwargs']} asks for an activation that clipkit does not have"
        )
    return "gelu_tanh" if asked == {"approximate": "tanh"} else "gelu"


def _open_clip_pool(text: Mapping[str, Any], files: TokenizerFiles) -> Any:
    """The token that is read: the last, or END; "argmax" takes it for the largest, "eos" for eos_id."""
    kind = text["pool_type"]
    if kind not in ("argmax", "eos", "last"):
        raise CheckpointError(f"text_cfg.pool_type {kind!r} is not supported")
    if kind == "last":
        return "last"
    due = files.size - 1 if kind == "argmax" else text["eos_id"]
    if files.end_id != due:
        raise CheckpointError(
            f"text_cfg.pool_type {kind!r} reads captions at token {due}, the tokenizer ends them with {files.end_id}"
        )
    return "end"


def _open_clip_cleaning(text: Mapping[str, Any], files: TokenizerFiles) -> Any:
    theirs = bool(text["hf_tokenizer_name"])
    if not theirs and not files.clip_like:
        raise CheckpointError("tokenizer.json is not CLIP's, and text_cfg has no hf_tokenizer_name to ask for another")
    how = only_known(
        text["tokenizer_kwargs"] or {},
        "text_cfg.tokenizer_kwargs",
        {"clean": "whitespace" if theirs else "lower"},
        {"strip_sep_token": _NO, "reduction_mask": (None, ""), "additional_special_tokens": (None, [])},
    )
    known = {"canonicalize": "canonical", "lower": "clip", "whitespace": "whitespace"} if theirs else {"lower": "clip"}
    if how["clean"] not in known:
        raise CheckpointError(f"text_cfg.tokenizer_kwargs.clean {how['clean']!r} is not supported")
    return known[how["clean"]]


def _open_clip_vit(
    shape: CLIPConfig, vision: Mapping[str, Any], activation: str, tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    patch = 16 if vision["patch_size"] is None else square(vision["patch_size"], "vision_cfg.patch_size")
    layers = 12 if vision["layers"] is None else vision["layers"]
    arguments = _vit_arguments(vision["width"], layers, vision["width"] // vision["head_width"], patch, activation)
    arguments["mlp_ratio"] = vision["mlp_ratio"]
    if vision["no_ln_pre"]:
        arguments["pre_norm"] = False
    if vision["ls_init_value"] is not None:
        arguments["init_values"] = vision["ls_init_value"]
    found = replace(shape, image_tower=VIT, image_kwargs=arguments)
    return found, translate(tensors, [*_OPENAI_VIT, *_OPENAI_TEXT, *_SCALES])


def _vit_arguments(width: int, layers: int, heads: int, patch: int, activation: str) -> dict[str, Any]:
    return {"embed_dim": width, "depth": layers, "num_heads": heads, "patch_size": patch, "act_layer": activation}


RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}


def _open_clip_resnet(
    shape: CLIPConfig, vision: Mapping[str, Any], tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    if vision["head_width"] != 64:  # which timm's tower has built in
        raise CheckpointError(f"vision_cfg.head_width {vision['head_width']} is not supported for a ResNet")
    if (name := RESNETS.get(tuple(vision["layers"]))) is None:
        raise CheckpointError(f"no ModifiedResNet of OpenAI's has {vision['layers']} blocks; known: {list(RESNETS)}")
    found = replace(shape, image_tower=name, conventions=replace(shape.conventions, image_projection="bias"))
    return found, translate(tensors, [*_OPENAI_RESNET, *_OPENAI_TEXT, *_SCALES])


def _open_clip_timm(
    shape: CLIPConfig, vision: Mapping[str, Any], tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    import timm

    name, biased = str(vision["timm_model_name"]), vision["timm_proj_bias"]
    pool, projection = (vision[key] if vision[key] is not None else "" for key in ("timm_pool", "timm_proj"))
    if pool not in ("", "avg", "map", "token"):
        raise CheckpointError(f"vision_cfg.timm_pool {pool!r} is not supported")
    if projection not in ("", "linear", "mlp", "none") or (projection == "mlp" and biased):
        raise CheckpointError(f"vision_cfg.timm_proj {projection!r}{' with a bias' * biased} is not supported")
    rules = [*_OPEN_CLIP_TIMM, *_OPENAI_TEXT, *_SCALES]
    if not projection:  # then the trunk's own classifier is one, with a bias
        classifier = timm.get_pretrained_cfg(name).classifier if timm.is_model(name) else "head"
        rules.insert(0, (rf"visual\.trunk\.{re.escape(classifier)}\.", "image.projection."))
    kind: Any = "bias" if not projection or (projection == "linear" and biased) else projection
    arguments = {"global_pool": pool} if pool else {}
    conventions = replace(shape.conventions, image_projection=kind)
    return replace(shape, image_tower=name, image_kwargs=arguments, conventions=conventions), translate(tensors, rules)


def from_transformers(
    config: Mapping[str, Any], seen: Mapping[str, Any] | None, tensors: Tensors, files: TokenizerFiles = _CLIPS
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """A config.json of transformers' CLIPModel or SiglipModel, its processor's settings, state dict and tokenizer.

    Raises CheckpointError for another `model_type`, for anything in the configuration that is not known here, and for
    tensors of another architecture.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise CheckpointError(f"model_type is {kind!r}; clip and siglip are supported")
    siglip = kind == "siglip"
    vision, text = _transformers_sections(config, siglip)
    arguments = _vit_arguments(
        vision["hidden_size"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        square(vision["patch_size"], "vision_config.patch_size"),
        _transformers_activation(vision, "vision_config"),
    )
    if vision["intermediate_size"] != 4 * vision["hidden_size"]:
        arguments["mlp_ratio"] = (vision["intermediate_size"] + 0.5) / vision["hidden_size"]  # which timm rounds down
    size = square(vision["image_size"], "vision_config.image_size")
    conventions = Conventions(
        text_activation=_transformers_activation(text, "text_config"),
        text_norm_eps=text["layer_norm_eps"],
        text_mlp_width=0 if text["intermediate_size"] == 4 * text["hidden_size"] else text["intermediate_size"],
        text_attention="full" if siglip else "causal",
        text_pool="last" if siglip else "end",
        text_projection_bias=siglip,
        text_cleaning=_transformers_cleaning(text, siglip, files),
        pad_id=_transformers_padding(text, files) if siglip else 0,
        image_projection="none" if siglip else "linear",
        **transformers_pictures(seen, kind, size),
    )
    shape = CLIPConfig(
        image_tower=SIGLIP if siglip else VIT,
        image_size=size,
        image_kwargs=arguments,
        embed_dim=_need(tensors, "text_model.head.weight" if siglip else "text_projection.weight").shape[0],
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        context_length=text["max_position_embeddings"],
        vocab_size=_need(tensors, "text_model.embeddings.token_embedding.weight").shape[0],
        init_logit_bias=0.0 if siglip else None,
        conventions=conventions,
    )
    return shape, translate(_joined(tensors), _TRANSFORMERS)


def _transformers_sections(config: Mapping[str, Any], siglip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """vision_config and text_config; CLIPs of 2022 have them twice, and the one with _dict in its name counts."""
    defaults = _SIGLIP_DEFAULTS if siglip else _CLIP_DEFAULTS
    names = ("vision_config", "text_config")
    only_known(
        config,
        "config.json",
        dict.fromkeys((*names, *(f"{name}_dict" for name in names))),
        {"pruned_heads": _NOTHING},
        {*_OF_NO_EFFECT, "projection_dim", "logit_scale_init_value"},
    )
    given = [config.get(name) or {} if config.get(f"{name}_dict") is None else config[f"{name}_dict"] for name in names]
    vision = {**defaults, "image_size": None, "patch_size": 16 if siglip else 32}
    vision |= {} if siglip else {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    built_in = {"num_channels": (3,), "vision_use_head": (True,), "pruned_heads": _NOTHING}
    found = only_known(given[0], names[0], {**vision, "patch_size": None}, built_in, _OF_NO_EFFECT)
    for key, default in (("image_size", 224), ("patch_size", vision["patch_size"])):
        found[key] = default if found[key] is None else found[key]
    if found["layer_norm_eps"] != defaults["layer_norm_eps"]:  # which timm's tower has built in
        raise CheckpointError(f"vision_config.layer_norm_eps {found['layer_norm_eps']} is not supported")
    text = {**defaults, "max_position_embeddings": 64 if siglip else 77}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return found, only_known(given[1], names[1], text | tokens, {"pruned_heads": _NOTHING}, _OF_NO_EFFECT)


def _transformers_activation(section: Mapping[str, Any], where: str) -> Any:
    activations = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if (name := section["hidden_act"]) not in activations:
        raise CheckpointError(f"{where}.hidden_act {name!r} is not supported; known: {', '.join(activations)}")
    return activations[name]


def _transformers_cleaning(text: Mapping[str, Any], siglip: bool, files: TokenizerFiles) -> Any:
    """Of captions; and checks that they are read where the tokenizer ends them, and are as long as it makes them."""
    if siglip:
        if files.longest is not None and files.longest < text["max_position_embeddings"]:
            raise CheckpointError(
                f"tokenizer_config.json: model_max_length is {files.longest}, and captions of this model are filled to "
                f"{text['max_position_embeddings']} tokens"
            )
        return siglip_cleaning(files)
    end = CLIP_VOCABULARY - 1 if text["eos_token_id"] is None else text["eos_token_id"]
    # 2 is what transformers once wrote for every CLIP; it stands for the largest token.
    if files.end_id != (files.size - 1 if end == 2 else end):
        raise CheckpointError(f"text_config.eos_token_id is {end}, and the tokenizer ends captions with {files.end_id}")
    return "clip" if files.clip_like else "none"


def _transformers_padding(text: Mapping[str, Any], files: TokenizerFiles) -> int:
    """Of SigLIP's captions. transformers writes 49406, 49407 and 1 of its own accord, whatever the tokenizer."""
    unsaid = (text["bos_token_id"], text["eos_token_id"]) == (CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1)
    return padding(files, None if unsaid else text["pad_token_id"], "text_config.pad_token_id")


_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
# Read off the tensors, for training, about files and outputs, or (in files of 2023 and before) for generating text.
_OF_NO_EFFECT = {
    "vocab_size", "projection_dim", "projection_size", "attention_dropout", "dropout", "initializer_range",
    "initializer_factor", "model_type", "architectures", "torch_dtype", "dtype", "transformers_version",
    "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "tokenizer_class",
    "task_specific_params", "return_dict", "use_return_dict", "output_hidden_states", "output_attentions",
    "output_scores", "torchscript", "use_bfloat16", "tf_legacy_loss", "tie_word_embeddings", "tie_encoder_decoder",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "use_cache",
    "chunk_size_feed_forward", "gradient_checkpointing", "prefix", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


def _joined(tensors: Tensors) -> dict[str, Tensor]:
    """Queries, keys and values as one matrix, as timm and we keep them; of the pooling head as q and kv."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith((".q_proj.weight", ".q_proj.bias")):
            parts = [name.replace(".q_proj.", f".{p}_proj.") for p in "qkv"]
            found[name.replace(".q_proj.", ".qkv.")] = torch.cat([_need(found, part) for part in parts])
            for part in parts:
                del found[part]
        elif (m := re.match(r"(vision_model\.head\.attention\.)in_proj_(weight|bias)$", name)) is not None:
            joined = found.pop(name)
            width = len(joined) // 3
            found[f"{m[1]}q.{m[2]}"], found[f"{m[1]}kv.{m[2]}"] = joined[:width], joined[width:]
    return found
