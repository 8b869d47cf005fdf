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

from clipkit.errors import CheckpointError
from clipkit.model import CLIPConfig, Conventions

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


_OPEN_CLIP_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
        "no_ln_pre": False, "ls_init_value": None,
        "timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": False,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
        "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "act_kwargs": None, "norm_kwargs": None,
        "pad_id": 0, "tokenizer_kwargs": None, "hf_tokenizer_name": None,
    },
}  # fmt: skip
# Of no effect on the features: for training, or about where weights and tokenizers come from.
_OPEN_CLIP_FREE = {
    "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "tokenizer_mode", "attn_pooler_heads",
    "attn_pooler_queries", "hf_model_pretrained", "eos_id", "ls_init_value",
}  # fmt: skip
# Whatever else is set asks for an architecture that is not here, unless it is set to what it would be anyway.
_OPEN_CLIP_NEUTRAL = {"pool_type": "tok", "pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}


def _section(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    known, given = _OPEN_CLIP_DEFAULTS[name], dict(model.get(name, {}))
    for key, value in given.items():
        if key not in known and key not in _OPEN_CLIP_FREE and value and value != _OPEN_CLIP_NEUTRAL.get(key):
            raise CheckpointError(f"{name}.{key} = {value!r} asks for an architecture that clipkit does not have")
    return {**known, **given}


def from_open_clip(config: Mapping[str, Any], tensors: Tensors) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """An open_clip_config.json and the state dict beside it.

    Raises CheckpointError for architectures that are not supported (text towers of transformers, CoCa, attentional
    pooling) and for tensors of another one.
    """
    model, seen = config.get("model_cfg", config), config.get("preprocess_cfg", {})
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    activation = _open_clip_activation(model, text)
    if text["pool_type"] not in ("argmax", "eos", "last"):
        raise CheckpointError(f"text_cfg.pool_type {text['pool_type']!r} is not supported")
    conventions = Conventions(
        text_activation=activation,
        text_norm_eps=(text["norm_kwargs"] or {}).get("eps", 1e-5),
        text_mlp_width=0 if text["mlp_ratio"] == 4 else int(text["width"] * text["mlp_ratio"]),
        text_attention="full" if text["no_causal_mask"] else "causal",
        text_pool="last" if text["pool_type"] == "last" else "end",
        text_projection_bias=text["proj_bias"],
        text_cleaning=_open_clip_cleaning(text),
        pad_id=1 if text["pool_type"] == "last" and text["vocab_size"] == 32000 else text["pad_id"],
        image_mean=tuple(seen.get("mean", Conventions.image_mean)),
        image_std=tuple(seen.get("std", Conventions.image_std)),
        image_resize="squash" if seen.get("resize_mode") == "squash" else "crop",
        image_interpolation="bilinear" if seen.get("interpolation") == "bilinear" else "bicubic",
    )
    size = vision["image_size"]
    shape = CLIPConfig(
        image_size=size if isinstance(size, int) else size[0],
        embed_dim=model["embed_dim"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        init_logit_bias=0.0 if "logit_bias" in tensors else None,
        conventions=conventions,
    )
    if vision["timm_model_name"]:
        return _open_clip_timm(shape, vision, tensors)
    if isinstance(vision["layers"], int):
        return _open_clip_vit(shape, vision, activation, tensors)
    return _open_clip_resnet(shape, vision, tensors)


def _open_clip_activation(model: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    if model.get("quick_gelu"):
        return "quick_gelu"
    if text["act_kwargs"] not in (None, {}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise CheckpointError(
            f"text_cfg.act_kwargs {text['act_kwargs']} asks for an activation that clipkit does not have"
        )
    return "gelu_tanh" if text["act_kwargs"] == {"approximate": "tanh"} else "gelu"


def _open_clip_cleaning(text: Mapping[str, Any]) -> Any:
    if text["hf_tokenizer_name"] is None:
        return "clip"
    cleaning = (text["tokenizer_kwargs"] or {}).get("clean", "whitespace")
    return {"canonicalize": "canonical", "lower": "clip"}.get(cleaning, "whitespace")


def _open_clip_vit(
    shape: CLIPConfig, vision: Mapping[str, Any], activation: str, tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    arguments = _vit_arguments(
        vision["width"], vision["layers"], vision["width"] // vision["head_width"], vision["patch_size"], activation
    )
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
    if (name := RESNETS.get(tuple(vision["layers"]))) is None:
        raise CheckpointError(f"no ModifiedResNet of OpenAI's has {vision['layers']} blocks; known: {list(RESNETS)}")
    found = replace(shape, image_tower=name, conventions=replace(shape.conventions, image_projection="bias"))
    return found, translate(tensors, [*_OPENAI_RESNET, *_OPENAI_TEXT, *_SCALES])


def _open_clip_timm(
    shape: CLIPConfig, vision: Mapping[str, Any], tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    import timm

    name, projection = vision["timm_model_name"], vision["timm_proj"]
    if vision["timm_pool"] not in ("", "avg", "map", "token"):
        raise CheckpointError(f"vision_cfg.timm_pool {vision['timm_pool']!r} is not supported")
    rules = [*_OPEN_CLIP_TIMM, *_OPENAI_TEXT, *_SCALES]
    if not projection:  # then the trunk's own classifier is one, with a bias
        classifier = timm.get_pretrained_cfg(name).classifier if timm.is_model(name) else "head"
        rules.insert(0, (rf"visual\.trunk\.{re.escape(classifier)}\.", "image.projection."))
    kind: Any = "bias" if not projection or vision["timm_proj_bias"] else projection
    arguments = {"global_pool": vision["timm_pool"]} if vision["timm_pool"] else {}
    conventions = replace(shape.conventions, image_projection=kind)
    return replace(shape, image_tower=name, image_kwargs=arguments, conventions=conventions), translate(tensors, rules)


def from_transformers(
    config: Mapping[str, Any], seen: Mapping[str, Any], tensors: Tensors
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """A config.json and preprocessor_config.json of transformers' CLIPModel or SiglipModel, and its state dict.

    Raises CheckpointError for another `model_type` and for tensors of another architecture.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise CheckpointError(f"model_type is {kind!r}; clip and siglip are supported")
    defaults = _CLIP_DEFAULTS if kind == "clip" else _SIGLIP_DEFAULTS
    vision = {**defaults, **_VISION_DEFAULTS, **(config.get("vision_config") or {})}
    text = {**defaults, **(config.get("text_config") or {})}
    activations = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if {vision["hidden_act"], text["hidden_act"]} - set(activations):
        raise CheckpointError(f"activations {vision['hidden_act']!r} and {text['hidden_act']!r} are not supported")
    if vision["layer_norm_eps"] != defaults["layer_norm_eps"]:  # which timm's tower has built in
        raise CheckpointError(f"vision_config.layer_norm_eps {vision['layer_norm_eps']} is not supported")
    arguments = _vit_arguments(
        vision["hidden_size"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        vision["patch_size"],
        activations[vision["hidden_act"]],
    )
    if vision["intermediate_size"] != 4 * vision["hidden_size"]:
        arguments["mlp_ratio"] = (vision["intermediate_size"] + 0.5) / vision["hidden_size"]  # which timm rounds down
    siglip = kind == "siglip"
    conventions = Conventions(
        text_activation=activations[text["hidden_act"]],  # type: ignore[arg-type]
        text_norm_eps=text["layer_norm_eps"],
        text_mlp_width=0 if text["intermediate_size"] == 4 * text["hidden_size"] else text["intermediate_size"],
        text_attention="full" if siglip else "causal",
        text_pool="last" if siglip else "end",
        text_projection_bias=siglip,
        text_cleaning="canonical" if siglip else "clip",
        pad_id=text["pad_token_id"] if siglip else 0,
        image_projection="none" if siglip else "linear",
        image_mean=tuple(seen.get("image_mean", (0.5, 0.5, 0.5) if siglip else Conventions.image_mean)),
        image_std=tuple(seen.get("image_std", (0.5, 0.5, 0.5) if siglip else Conventions.image_std)),
        image_resize="squash" if siglip else "crop",
        image_interpolation="bilinear" if seen.get("resample") == 2 else "bicubic",
    )
    shape = CLIPConfig(
        image_tower=SIGLIP if siglip else VIT,
        image_size=vision["image_size"],
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


_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "image_size": 224,
    "patch_size": 32,
}  # fmt: skip
_VISION_DEFAULTS: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "max_position_embeddings": 64, "image_size": 224,
    "patch_size": 16, "pad_token_id": 1,
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
