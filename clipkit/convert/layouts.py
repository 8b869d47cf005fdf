"""The weight names of OpenAI's CLIP, open_clip, timm towers, transformers' CLIP and SigLIP, and diffusers' VAE.

OpenAI's names are open_clip's. Import and export read the same tables, one in each direction.
"""

from __future__ import annotations

from clipkit.convert.renaming import (
    BATCHED,
    SCALAR,
    SCALAR_1D,
    TOKEN,
    TRANSPOSED,
    Layout,
    Row,
    each,
    rows,
    split,
)

# OpenAI and open_clip

_SCALES = (Row("logit_scale", "log_logit_scale", SCALAR), Row("logit_bias", "logit_bias", SCALAR))

_VIT_BLOCK = (
    ("attn.in_proj_*", "attn.qkv.*"),
    ("attn.out_proj.*", "attn.proj.*"),
    ("ln_{j}.*", "norm{j}.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
    ("ls_{j}.*", "ls{j}.*"),
)
_VIT = (
    Row("visual.conv1.*", "image.trunk.patch_embed.proj.*"),
    Row("visual.class_embedding", "image.trunk.cls_token", TOKEN),
    Row("visual.positional_embedding", "image.trunk.pos_embed", BATCHED),
    Row("visual.ln_pre.*", "image.trunk.norm_pre.*"),
    Row("visual.ln_post.*", "image.trunk.norm.*"),
    Row("visual.proj", "image.projection.weight", TRANSPOSED),
    *(Row(f"visual.transformer.resblocks.{{i}}.{a}", f"image.trunk.blocks.{{i}}.{b}") for a, b in _VIT_BLOCK),
)

_RESNET = (
    *(
        Row(f"visual.layer{i + 1}.{{i}}.{kind}{j + 1}.*", f"image.trunk.stages.{i}.{{i}}.{conv}.{kind}.*")
        for i in range(4)
        for j, conv in enumerate(("conv1_1x1", "conv2_kxk", "conv3_1x1"))
        for kind in ("conv", "bn")
    ),
    *(
        Row(f"visual.layer{i + 1}.{{i}}.downsample.{j}.*", f"image.trunk.stages.{i}.{{i}}.shortcut.conv.{kind}.*")
        for i in range(4)
        for j, kind in enumerate(("conv", "bn"))
    ),
    Row("visual.conv{i}.*", "image.trunk.stem.conv{i}.conv.*"),
    Row("visual.bn{i}.*", "image.trunk.stem.conv{i}.bn.*"),
    Row("visual.attnpool.positional_embedding", "image.trunk.head.pos_embed"),
    *(Row(f"visual.attnpool.{name}_proj.*", f"image.trunk.head.{name}.*") for name in "qkv"),
    Row("visual.attnpool.c_proj.*", "image.projection.*"),
)

_TIMM_PROJECTION = (
    Row("visual.head.mlp.fc1.*", "image.projection.0.*"),
    Row("visual.head.mlp.fc2.*", "image.projection.2.*"),
    Row("visual.head.proj.*", "image.projection.*"),
)

_TEXT_BLOCK = (
    ("attn.in_proj_*", "qkv.*"),
    ("attn.out_proj.*", "out.*"),
    ("ln_{j}.*", "norm{j}.*"),
    ("mlp.c_fc.*", "mlp.0.*"),
    ("mlp.c_proj.*", "mlp.2.*"),
)
_TEXT = (
    Row("token_embedding.*", "text.tokens.*"),
    Row("positional_embedding", "text.positions"),
    *(Row(f"transformer.resblocks.{{i}}.{a}", f"text.blocks.{{i}}.{b}") for a, b in _TEXT_BLOCK),
    Row("ln_final.*", "text.norm.*"),
)
_TEXT_MATRIX = Row("text_projection", "text.projection.weight", TRANSPOSED)
_TEXT_LINEAR = Row("text_projection.*", "text.projection.*")


def _open_clip(image: tuple[Row, ...], text_bias: bool) -> Layout:
    """`text_bias`: whether the text projection has a bias, and is therefore a module and not a matrix."""
    matrix = (_TEXT_LINEAR, _TEXT_MATRIX) if text_bias else (_TEXT_MATRIX, _TEXT_LINEAR)
    text = (*_TEXT, matrix[0])
    # open_clip's CustomTextCLIP has its text encoder's names behind "text."
    legacy = (matrix[1], *(row.under("text.") for row in (*text, matrix[1])))
    return Layout(rows(image, text, _SCALES), legacy)


def open_clip_vit(text_bias: bool = False) -> Layout:
    """OpenAI's and open_clip's own vision transformer."""
    return _open_clip(_VIT, text_bias)


def open_clip_resnet(text_bias: bool = False) -> Layout:
    """OpenAI's ModifiedResNet."""
    return _open_clip(_RESNET, text_bias)


def open_clip_timm(text_bias: bool = False, classifier: str = "") -> Layout:
    """open_clip around a timm tower, whose own `classifier`, if it is given, is the projection."""
    projection = (Row(f"visual.trunk.{classifier}.*", "image.projection.*"),) if classifier else _TIMM_PROJECTION
    return _open_clip((*projection, Row("visual.trunk.*", "image.trunk.*")), text_bias)


# transformers

_QKV = split((1, 1, 1), (3,))
_Q_KV = split((3,), (1, 2))


def _transformers_rows(theirs: str, ours: str, mlp: tuple[str, str], out: str, qkv: str) -> tuple[Row, ...]:
    layer, block = f"{theirs}.encoder.layers.{{i}}", f"{ours}.blocks.{{i}}"
    return (
        Row(tuple(f"{layer}.self_attn.{name}_proj.*" for name in "qkv"), f"{block}.{qkv}.*", _QKV),
        Row(f"{layer}.self_attn.out_proj.*", f"{block}.{out}.*"),
        Row(f"{layer}.layer_norm{{j}}.*", f"{block}.norm{{j}}.*"),
        *(Row(f"{layer}.mlp.fc{i + 1}.*", f"{block}.mlp.{name}.*") for i, name in enumerate(mlp)),
    )


_TRANSFORMERS = (
    Row("vision_model.embeddings.patch_embedding.*", "image.trunk.patch_embed.proj.*"),
    Row("vision_model.embeddings.position_embedding.weight", "image.trunk.pos_embed", BATCHED),
    Row("vision_model.post_layernorm.*", "image.trunk.norm.*"),
    *_transformers_rows("vision_model", "image.trunk", ("fc1", "fc2"), "attn.proj", "attn.qkv"),
    Row("text_model.embeddings.token_embedding.*", "text.tokens.*"),
    Row("text_model.embeddings.position_embedding.weight", "text.positions"),
    *_transformers_rows("text_model", "text", ("0", "2"), "out", "qkv"),
    Row("text_model.final_layer_norm.*", "text.norm.*"),
)

TRANSFORMERS_CLIP = Layout(
    (
        *_TRANSFORMERS,
        Row("vision_model.embeddings.class_embedding", "image.trunk.cls_token", TOKEN),
        Row("vision_model.pre_layrnorm.*", "image.trunk.norm_pre.*"),  # their spelling
        Row("visual_projection.*", "image.projection.*"),
        Row("text_projection.*", "text.projection.*"),
        *_SCALES,
    )
)

TRANSFORMERS_SIGLIP = Layout(
    (
        *_TRANSFORMERS,
        Row("vision_model.head.probe", "image.trunk.attn_pool.latent"),
        *(
            Row(
                f"vision_model.head.attention.in_proj_{kind}",
                (f"image.trunk.attn_pool.q.{kind}", f"image.trunk.attn_pool.kv.{kind}"),
                _Q_KV,
            )
            for kind in ("weight", "bias")
        ),
        Row("vision_model.head.attention.out_proj.*", "image.trunk.attn_pool.proj.*"),
        Row("vision_model.head.layernorm.*", "image.trunk.attn_pool.norm.*"),
        Row("vision_model.head.mlp.*", "image.trunk.attn_pool.mlp.*"),
        Row("text_model.head.*", "text.projection.*"),
        Row("logit_scale", "log_logit_scale", SCALAR_1D),
        Row("logit_bias", "logit_bias", SCALAR_1D),
    )
)


# diffusers

_MATRIX = each(lambda t: t.flatten(1) if t.ndim > 1 else t, lambda t: t)
"""Older files have the matrices of the attention as 1x1 convolutions."""


def _coder_rows(coder: str, way: str, blocks: int) -> tuple[Row, ...]:
    """Rows of the encoder or the decoder, with this many residual blocks at each resolution."""
    level, attention = f"{coder}.{way}_blocks.{{i}}", f"{coder}.mid_block.attentions.0"
    return (
        Row(f"{coder}.conv_in.*", f"{coder}.stem.*"),
        Row(f"{coder}.conv_norm_out.*", f"{coder}.norm.*"),
        Row(f"{coder}.conv_out.*", f"{coder}.head.*"),
        *(Row(f"{coder}.mid_block.resnets.{i}.*", f"{coder}.middle.{2 * i}.*") for i in (0, 1)),
        Row(f"{attention}.group_norm.*", f"{coder}.middle.1.norm.*"),
        *(Row(f"{attention}.to_{name}.*", f"{coder}.middle.1.{name}.*", _MATRIX) for name in "qkv"),
        Row(f"{attention}.to_out.0.*", f"{coder}.middle.1.out.*", _MATRIX),
        Row(f"{level}.{way}samplers.0.conv.*", f"{coder}.levels.{{i}}.{blocks}.*"),
        Row(f"{level}.resnets.{{j}}.conv_shortcut.*", f"{coder}.levels.{{i}}.{{j}}.skip.*"),
        Row(f"{level}.resnets.{{j}}.*", f"{coder}.levels.{{i}}.{{j}}.*"),
    )


def diffusers_autoencoder(blocks: int) -> Layout:
    """AutoencoderKL with `blocks` residual blocks at each resolution of the encoder, and one more in the decoder."""
    former = (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "out"))
    return Layout(
        rows(
            Row("quant_conv.*", "before.*"),
            Row("post_quant_conv.*", "after.*"),
            _coder_rows("encoder", "down", blocks),
            _coder_rows("decoder", "up", blocks + 1),
        ),
        tuple(
            Row(f"{coder}.mid_block.attentions.0.{theirs}.*", f"{coder}.middle.1.{ours}.*", _MATRIX)
            for coder in ("encoder", "decoder")
            for theirs, ours in former
        ),
    )
