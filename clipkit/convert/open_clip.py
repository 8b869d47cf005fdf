"""open_clip's configuration files, read and written: the shape of a model, its preprocessing, and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from clipkit.convert.layouts import open_clip_resnet, open_clip_timm, open_clip_vit
from clipkit.convert.processors import open_clip_pictures, open_clip_preprocessing, square
from clipkit.convert.renaming import Layout, Tensors
from clipkit.convert.tokenizer_files import CLIP_TOKENIZER, CLIP_VOCABULARY, TokenizerFiles, padding
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import only_known
from clipkit.models.clip import CLIP, CLIPConfig, Conventions
from clipkit.models.tokenizer import AnyTokenizer, Tokenizer

VIT = "vit_base_patch16_clip_224"
"""timm's ViT with CLIP's norm before the first block; its sizes are given as arguments."""


# Reading


# Fields of open_clip's CLIPVisionCfg and CLIPTextCfg: those that are read, with their defaults; those that are built
# in here, with the values that are allowed; those without effect.
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
_CLEANINGS = {"canonicalize": "canonical", "lower": "clip", "whitespace": "whitespace"}
"""open_clip's names for the cleaning of captions -> ours."""


def from_open_clip(
    config: Mapping[str, Any], tensors: Tensors, files: TokenizerFiles = CLIP_TOKENIZER
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """An open_clip_config.json, its state dict and its tokenizer -> our configuration and state dict.

    Raises CheckpointError for architectures that are not supported (text encoders of transformers, CoCa, attentional
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
    activation = _activation(model, text)
    full = text["no_causal_mask"]
    conventions = Conventions(
        text_activation=activation,
        text_norm_eps=only_known(text["norm_kwargs"] or {}, "text_cfg.norm_kwargs", {"eps": 1e-5})["eps"],
        text_mlp_width=0 if text["mlp_ratio"] == 4 else int(text["width"] * text["mlp_ratio"]),
        text_attention="full" if full else "causal",
        text_pool=_pool(text, files),
        text_projection_bias=text["proj_bias"],
        text_cleaning=_cleaning(text, files),
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
        shape, layout = _timm(shape, vision)
    elif isinstance(vision["layers"], (list, tuple)):
        shape, layout = _resnet(shape, vision)
    else:
        shape, layout = _vit(shape, vision, activation)
    return shape, layout.to_ours(tensors)


def _activation(model: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    asked = text["act_kwargs"] or {"approximate": "none"}
    if model["quick_gelu"] and not text["act_kwargs"]:
        return "quick_gelu"
    if model["quick_gelu"] or asked not in ({"approximate": "none"}, {"approximate": "tanh"}):
        raise CheckpointError(
            f"text_cfg.act_kwargs {text['act_kwargs']} asks for an activation that clipkit does not have"
        )
    return "gelu_tanh" if asked == {"approximate": "tanh"} else "gelu"


def _pool(text: Mapping[str, Any], files: TokenizerFiles) -> Any:
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


def _cleaning(text: Mapping[str, Any], files: TokenizerFiles) -> Any:
    theirs = bool(text["hf_tokenizer_name"])
    if not theirs and not files.clip_like:
        raise CheckpointError("tokenizer.json is not CLIP's, and text_cfg has no hf_tokenizer_name to ask for another")
    how = only_known(
        text["tokenizer_kwargs"] or {},
        "text_cfg.tokenizer_kwargs",
        {"clean": "whitespace" if theirs else "lower"},
        {"strip_sep_token": _NO, "reduction_mask": (None, ""), "additional_special_tokens": (None, [])},
    )
    known = _CLEANINGS if theirs else {"lower": "clip"}
    if how["clean"] not in known:
        raise CheckpointError(f"text_cfg.tokenizer_kwargs.clean {how['clean']!r} is not supported")
    return known[how["clean"]]


def _vit(shape: CLIPConfig, vision: Mapping[str, Any], activation: str) -> tuple[CLIPConfig, Layout]:
    patch = 16 if vision["patch_size"] is None else square(vision["patch_size"], "vision_cfg.patch_size")
    layers = 12 if vision["layers"] is None else vision["layers"]
    arguments = vit_arguments(vision["width"], layers, vision["width"] // vision["head_width"], patch, activation)
    arguments["mlp_ratio"] = vision["mlp_ratio"]
    if vision["no_ln_pre"]:
        arguments["pre_norm"] = False
    if vision["ls_init_value"] is not None:
        arguments["init_values"] = vision["ls_init_value"]
    return replace(shape, image_tower=VIT, image_kwargs=arguments), open_clip_vit()


def vit_arguments(width: int, layers: int, heads: int, patch: int, activation: str) -> dict[str, Any]:
    """Arguments of timm's ViT constructor."""
    return {"embed_dim": width, "depth": layers, "num_heads": heads, "patch_size": patch, "act_layer": activation}


RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}
"""Blocks of each stage of OpenAI's ResNets -> timm's name."""


def _resnet(shape: CLIPConfig, vision: Mapping[str, Any]) -> tuple[CLIPConfig, Layout]:
    if vision["head_width"] != 64:  # which timm's tower has built in
        raise CheckpointError(f"vision_cfg.head_width {vision['head_width']} is not supported for a ResNet")
    if (name := RESNETS.get(tuple(vision["layers"]))) is None:
        raise CheckpointError(f"no ModifiedResNet of OpenAI's has {vision['layers']} blocks; known: {list(RESNETS)}")
    conventions = replace(shape.conventions, image_projection="bias")
    return replace(shape, image_tower=name, conventions=conventions), open_clip_resnet()


def _timm(shape: CLIPConfig, vision: Mapping[str, Any]) -> tuple[CLIPConfig, Layout]:
    import timm

    name, biased = str(vision["timm_model_name"]), vision["timm_proj_bias"]
    pool, projection = (vision[key] if vision[key] is not None else "" for key in ("timm_pool", "timm_proj"))
    if pool not in ("", "avg", "map", "token"):
        raise CheckpointError(f"vision_cfg.timm_pool {pool!r} is not supported")
    if projection not in ("", "linear", "mlp", "none") or (projection == "mlp" and biased):
        raise CheckpointError(f"vision_cfg.timm_proj {projection!r}{' with a bias' * biased} is not supported")
    classifier = ""
    if not projection:  # then the trunk's own classifier is the projection, and has a bias
        classifier = str(timm.get_pretrained_cfg(name).classifier) if timm.is_model(name) else "head"
    kind: Any = "bias" if not projection or (projection == "linear" and biased) else projection
    arguments = {"global_pool": pool} if pool else {}
    conventions = replace(shape.conventions, image_projection=kind)
    shape = replace(shape, image_tower=name, image_kwargs=arguments, conventions=conventions)
    return shape, open_clip_timm(classifier=classifier)


# Writing


def to_open_clip(model: CLIP, tokenizer: AnyTokenizer, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of open_clip_config.json and the state dict of a model that will be published as `name`.

    Raises UsageError for architectures that open_clip does not have.
    """
    config, conventions = model.config, model.config.conventions
    vision, layout = _vision_to_open_clip(model)
    tensors = layout.to_theirs(model.state_dict())
    content: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": vision,
        "text_cfg": _text_to_open_clip(model, tokenizer, name),
    }
    if conventions.text_activation == "quick_gelu":
        content["quick_gelu"] = True
    if "logit_bias" in tensors:
        content["init_logit_bias"] = float(tensors["logit_bias"])
    return {"model_cfg": content, "preprocess_cfg": open_clip_preprocessing(conventions)}, tensors


def _text_to_open_clip(model: CLIP, tokenizer: AnyTokenizer, name: str) -> dict[str, Any]:
    config, conventions = model.config, model.config.conventions
    text: dict[str, Any] = {
        "context_length": config.context_length,
        "vocab_size": len(model.text.tokens.weight),
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "no_causal_mask": conventions.text_attention == "full",
        "proj_bias": conventions.text_projection_bias,
        "norm_kwargs": {"eps": conventions.text_norm_eps},
        "pool_type": "last" if conventions.text_pool == "last" else "eos",
        "eos_id": tokenizer.end_id,
        "pad_id": conventions.pad_id,
    }
    if conventions.text_mlp_width:
        text["mlp_ratio"] = (conventions.text_mlp_width + 0.5) / config.text_width  # which open_clip rounds down
    if conventions.text_activation == "gelu_tanh":
        text["act_kwargs"] = {"approximate": "tanh"}
    cleanings = {ours: theirs for theirs, ours in _CLEANINGS.items()}
    if conventions.text_cleaning not in cleanings:
        raise UsageError(f"open_clip has no caption cleaning {conventions.text_cleaning!r}, which this model needs")
    if not (isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size == CLIP_VOCABULARY):
        text["hf_tokenizer_name"] = name
        text["tokenizer_kwargs"] = {"clean": cleanings[conventions.text_cleaning]}
    return text


def _vision_to_open_clip(model: CLIP) -> tuple[dict[str, Any], Layout]:
    config, conventions = model.config, model.config.conventions
    text_bias = conventions.text_projection_bias
    arguments = dict(config.image_kwargs)
    if config.image_tower == VIT and conventions.image_projection == "linear":
        if arguments.pop("act_layer", "gelu") != conventions.text_activation:
            raise UsageError("open_clip's own ViT has one activation for both encoders; this model has two")
        return _vit_to_open_clip(config), open_clip_vit(text_bias)
    if config.image_tower in RESNETS.values() and conventions.image_projection == "bias" and not arguments:
        return _resnet_to_open_clip(model), open_clip_resnet(text_bias)
    if config.image_tower in (VIT, *RESNETS.values()):
        raise UsageError(
            f"export of {config.image_tower} with {conventions.image_projection} projection is not supported"
        )
    if unknown := set(arguments) - {"global_pool"}:
        raise UsageError(f"open_clip makes timm towers by their name; it does not take image_kwargs.{min(unknown)}")
    _check_default_shape(model)
    return {
        "timm_model_name": config.image_tower,
        "timm_model_pretrained": False,
        "timm_pool": arguments.get("global_pool", ""),
        "timm_proj": "linear" if conventions.image_projection == "bias" else conventions.image_projection,
        "timm_proj_bias": conventions.image_projection == "bias",
        "image_size": config.image_size,
    }, open_clip_timm(text_bias)


def _vit_to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    arguments = config.image_kwargs
    shape: dict[str, Any] = {
        "image_size": config.image_size,
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


def _resnet_to_open_clip(model: CLIP) -> dict[str, Any]:
    blocks = {name: list(layers) for layers, name in RESNETS.items()}
    width = len(model.image.trunk.get_parameter("stages.0.0.conv1_1x1.conv.weight"))
    return {"image_size": model.config.image_size, "layers": blocks[model.config.image_tower], "width": width}


def _check_default_shape(model: CLIP) -> None:
    """timm builds the tower for its own image size; where that shows in the weights, ours must be the same."""
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
