"""transformers' configuration files of CLIP and SigLIP, read and written: shape, preprocessing and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipkit.convert.layouts import TRANSFORMERS_CLIP, TRANSFORMERS_SIGLIP
from clipkit.convert.open_clip import VIT, vit_arguments
from clipkit.convert.processors import square, transformers_pictures, transformers_preprocessing
from clipkit.convert.renaming import Tensors, need
from clipkit.convert.tokenizer_files import CLIP_TOKENIZER, CLIP_VOCABULARY, TokenizerFiles, padding, siglip_cleaning
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import only_known
from clipkit.models.clip import CLIP, CLIPConfig, Conventions
from clipkit.models.tokenizer import AnyTokenizer, Tokenizer

SIGLIP = "vit_base_patch16_siglip_224"
"""timm's ViT with SigLIP's attention pooling; its sizes are given as arguments."""


# Reading


def from_transformers(
    config: Mapping[str, Any],
    seen: Mapping[str, Any] | None,
    tensors: Tensors,
    files: TokenizerFiles = CLIP_TOKENIZER,
) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """A config.json of transformers' CLIPModel or SiglipModel, its processor's settings, state dict and tokenizer.

    Raises CheckpointError for another `model_type`, for anything in the configuration that is not known here, and for
    tensors of another architecture.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise CheckpointError(f"model_type is {kind!r}; clip and siglip are supported")
    siglip = kind == "siglip"
    vision, text = _sections(config, siglip)
    arguments = vit_arguments(
        vision["hidden_size"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        square(vision["patch_size"], "vision_config.patch_size"),
        _activation(vision, "vision_config"),
    )
    if vision["intermediate_size"] != 4 * vision["hidden_size"]:
        arguments["mlp_ratio"] = (vision["intermediate_size"] + 0.5) / vision["hidden_size"]  # which timm rounds down
    size = square(vision["image_size"], "vision_config.image_size")
    conventions = Conventions(
        text_activation=_activation(text, "text_config"),
        text_norm_eps=text["layer_norm_eps"],
        text_mlp_width=0 if text["intermediate_size"] == 4 * text["hidden_size"] else text["intermediate_size"],
        text_attention="full" if siglip else "causal",
        text_pool="last" if siglip else "end",
        text_projection_bias=siglip,
        text_cleaning=_cleaning(text, siglip, files),
        pad_id=_padding(text, files) if siglip else 0,
        image_projection="none" if siglip else "linear",
        **transformers_pictures(seen, kind, size),
    )
    shape = CLIPConfig(
        image_tower=SIGLIP if siglip else VIT,
        image_size=size,
        image_kwargs=arguments,
        embed_dim=need(tensors, "text_model.head.weight" if siglip else "text_projection.weight").shape[0],
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        context_length=text["max_position_embeddings"],
        vocab_size=need(tensors, "text_model.embeddings.token_embedding.weight").shape[0],
        init_logit_bias=0.0 if siglip else None,
        conventions=conventions,
    )
    return shape, (TRANSFORMERS_SIGLIP if siglip else TRANSFORMERS_CLIP).to_ours(tensors)


def _sections(config: Mapping[str, Any], siglip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """vision_config and text_config; files of 2022 have them twice, and the one with _dict in its name is used."""
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


def _activation(section: Mapping[str, Any], where: str) -> Any:
    if (name := section["hidden_act"]) not in _ACTIVATIONS:
        raise CheckpointError(f"{where}.hidden_act {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names -> ours."""


def _cleaning(text: Mapping[str, Any], siglip: bool, files: TokenizerFiles) -> Any:
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


def _padding(text: Mapping[str, Any], files: TokenizerFiles) -> int:
    """Of SigLIP's captions. transformers writes 49406, 49407 and 1 as defaults, whatever the tokenizer."""
    unsaid = (text["bos_token_id"], text["eos_token_id"]) == (CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1)
    return padding(files, None if unsaid else text["pad_token_id"], "text_config.pad_token_id")


_NOTHING: tuple[Any, ...] = (None, {})
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


# Writing


def to_transformers(model: CLIP, tokenizer: AnyTokenizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json and preprocessor_config.json, and the state dict.

    Raises UsageError for architectures that transformers does not have.
    """
    siglip = _is_siglip(model.config)
    layout = TRANSFORMERS_SIGLIP if siglip else TRANSFORMERS_CLIP
    return (
        _config(model, tokenizer, siglip),
        transformers_preprocessing(model.config.conventions, model.config.image_size, siglip),
        layout.to_theirs(model.state_dict()),
    )


def _is_siglip(config: CLIPConfig) -> bool:
    """Whether transformers' SigLIP is the architecture, and not its CLIP. Raises UsageError where neither is."""
    conventions = config.conventions
    full = conventions.text_attention == "full"
    siglip = config.image_tower == SIGLIP and full and conventions.image_projection == "none"
    if not siglip and (config.image_tower != VIT or full or conventions.text_projection_bias):
        raise UsageError(f"transformers has CLIP with OpenAI's ViT, and SigLIP; not with {config.image_tower}")
    if not siglip and {"pre_norm", "init_values"} & set(config.image_kwargs):
        raise UsageError("transformers' CLIP has a norm before the first block and no layer scale; this model differs")
    if conventions.image_resize == "pad":
        raise UsageError("this model pads pictures to a square; transformers' processors of CLIP and SigLIP do not")
    return siglip


def _config(model: CLIP, tokenizer: AnyTokenizer, siglip: bool) -> dict[str, Any]:
    config, conventions, arguments = model.config, model.config.conventions, model.config.image_kwargs
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    vision = {
        "hidden_size": arguments["embed_dim"],
        "intermediate_size": int(arguments["embed_dim"] * arguments.get("mlp_ratio", 4)),
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "patch_size": arguments["patch_size"],
        "image_size": config.image_size,
        "hidden_act": activations[arguments.get("act_layer", "gelu")],
        "layer_norm_eps": 1e-6 if siglip else 1e-5,
    }
    text = {
        "hidden_size": config.text_width,
        "intermediate_size": conventions.text_mlp_width or 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "vocab_size": len(model.text.tokens.weight),
        "hidden_act": activations[conventions.text_activation],
        "layer_norm_eps": conventions.text_norm_eps,
        "eos_token_id": tokenizer.end_id,
        "bos_token_id": tokenizer.start_id if isinstance(tokenizer, Tokenizer) else None,
        "pad_token_id": conventions.pad_id,
    }
    sections = {"vision_config": vision, "text_config": text}
    if siglip:
        return {"model_type": "siglip", "architectures": ["SiglipModel"], **sections}
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config.embed_dim, **sections}
