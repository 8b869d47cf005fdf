"""Tiny published-layout CLIPs, written without the libraries of their layouts."""

from pathlib import Path

import torch

from clipkit.convert.export import export
from clipkit.convert.open_clip import VIT
from clipkit.convert.transformers import SIGLIP
from clipkit.data.images import preprocessing
from clipkit.models.clip import CLIP, CLIPConfig, Conventions
from clipkit.models.pretrained import Pretrained
from clipkit.models.tokenizer import ExternalTokenizer, Tokenizer

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "yellow",
    "big",
    "small",
    "car",
    "rocket",
    "house",
    "tree",
    "fish",
    "star",
    "photo",
    "of",
    "the",
    "with",
    "on",
    "in",
    "two",
    "one",
]
CONVENTIONS = Conventions(
    text_activation="quick_gelu", image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4), image_resize="squash"
)
VIT_KWARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "act_layer": "quick_gelu"}


def publish(folder: Path, form: str, image_size: int = 24, extra_rows: int = 0) -> Path:
    """A folder in the layout `form`, "open_clip" or "transformers", with token embeddings that no token uses."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([f"{a} {b}" for a in WORDS for b in WORDS], 600, 16)
    config = CLIPConfig(
        VIT, image_size, VIT_KWARGS, embed_dim=24, text_width=32, text_layers=2, text_heads=2, context_length=16,
        conventions=CONVENTIONS,
    )  # fmt: skip
    model = CLIP(config, tokenizer.vocab_size + extra_rows, tokenizer.end_id).eval()
    export(Pretrained(model, tokenizer, preprocessing(config)), folder, form)
    return folder


def publish_siglip(folder: Path) -> Path:
    """A SigLIP in transformers' layout: full attention, a logit bias, and a tokenizer of another kind."""
    from tokenizers import Tokenizer as Encoder
    from tokenizers import models, pre_tokenizers, processors, trainers

    torch.manual_seed(0)
    encoder = Encoder(models.Unigram())
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    encoder.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    encoder.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    conventions = Conventions(
        text_attention="full", text_pool="last", text_projection_bias=True, image_projection="none", pad_id=1,
        text_norm_eps=1e-6, text_activation="gelu_tanh", text_cleaning="none", image_resize="squash",
    )  # fmt: skip
    config = CLIPConfig(
        SIGLIP, 24, {**VIT_KWARGS, "act_layer": "gelu_tanh"}, embed_dim=32, text_width=32, text_layers=1, text_heads=2,
        context_length=12, init_logit_bias=-10.0, conventions=conventions,
    )  # fmt: skip
    tokenizer = ExternalTokenizer(encoder, 12, "none", pad_id=1)
    model = CLIP(config, tokenizer.vocab_size, tokenizer.end_id).eval()
    export(Pretrained(model, tokenizer, preprocessing(config)), folder, "transformers")
    return folder
