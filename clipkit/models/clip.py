"""CLIP: an image encoder, a text encoder, and the logit scale (inverse temperature) of their similarities.

Radford et al. 2021 (arXiv 2103.00020), section 2.3 and figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkit.config import require
from clipkit.errors import RecipeError, did_you_mean
from clipkit.registry import TOWERS

MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Conventions:
    """Compatibility switches: how published weights differ from CLIPs that are trained here, which have the defaults.

    They are set from the files of a published model. A recipe sets them only to train a model of another kind.
    """

    text_activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    """Activation of the text encoder; "quick_gelu", x sigmoid(1.702 x), is OpenAI's. The image encoder's is set in
    image_kwargs."""
    text_norm_eps: float = 1e-5
    """Epsilon of the text encoder's layer norms."""
    text_mlp_width: int = 0
    """Width inside its MLPs; 0 is four times text_width."""
    text_attention: Literal["causal", "full"] = "causal"
    """"full" pads every caption to context_length, and lets all of its tokens, padding included, attend to each
    other."""
    text_pool: Literal["end", "last"] = "end"
    """Token whose features are the caption's: the first END, or the last of the padded caption."""
    text_projection_bias: bool = False
    """Whether the text projection has a bias."""
    text_cleaning: Literal["clip", "canonical", "whitespace", "siglip", "lower", "none"] = "clip"
    """How captions are cleaned before tokenization (clipkit/models/tokenizer.py): "canonical" is open_clip's for
    SigLIP, "siglip" and "lower" are transformers' for SigLIP and SigLIP 2."""
    pad_id: int = 0
    """Token that pads captions under full attention."""
    image_projection: Literal["linear", "bias", "mlp", "none"] = "linear"
    """Projection after the image tower: a matrix, a matrix with a bias, two layers with a GELU between, or none."""
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from pixels in [0, 1]; by default the statistics of OpenAI's models."""
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Pixels are divided by these."""
    image_resize: Literal["crop", "squash", "pad"] = "crop"
    """How an image is made square: its middle, a change of its proportions, or a margin ("letterbox")."""
    image_fill: int = 0
    """Grey level of the margin, 0 to 255."""
    image_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized for evaluation."""

    def __post_init__(self) -> None:
        require("above 0", "model.conventions", self, "text_norm_eps")
        require("at least 0", "model.conventions", self, "text_mlp_width", "pad_id")
        if len(self.image_mean) != len(self.image_std) or not all(std > 0 for std in self.image_std):
            raise RecipeError(
                f"model.conventions.image_std is {self.image_std}; it must have a number above 0 for each of image_mean"
            )


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of a CLIP: its image encoder, its text encoder and the embedding that they share."""

    image_tower: str = "convnext_atto"
    """Trunk of the image encoder: a model of timm by its name; clipkit_resnet or clipkit_resnet9, for images of some 32
    pixels; or the tower of another package (clipkit/models/towers.py)."""
    image_size: int = 32
    """Side of the square input, in pixels."""
    image_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the tower's constructor, for instance patch_size."""
    embed_dim: int = 256
    """Width of the shared embedding."""
    text_width: int = 128
    """Width of the text encoder, a transformer."""
    text_layers: int = 2
    """Blocks of the text encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    context_length: int = 77
    """Longest caption in tokens, start and end included; longer ones are cut."""
    vocab_size: int = 4096
    """Largest vocabulary of the tokenizer that is trained on the captions; no effect with `merges`."""
    merges: str = ""
    """File of CLIP's byte-pair merges, bpe_simple_vocab_16e6.txt.gz: the tokenizer is then CLIP's own, of 49,408
    tokens, instead of one that is trained on the captions."""
    grad_checkpointing: bool = False
    """Activation checkpointing: keep only the input of each block for the backward pass and compute the rest again;
    less memory, a third more time."""
    init_logit_scale: float = 1 / 0.07
    """Logit scale (inverse temperature) before training; 10 for the sigmoid loss."""
    init_logit_bias: float | None = None
    """Logit bias before training, which only the sigmoid loss learns: -10 there."""
    conventions: Conventions = field(default_factory=Conventions)
    """Compatibility switches, set from the files of published weights."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "embed_dim", "text_width", "text_layers", "text_heads", "vocab_size")
        require("at least 1", "model", self, *sizes)
        if self.text_width % self.text_heads:
            raise RecipeError(f"text_width {self.text_width} does not divide by text_heads {self.text_heads}")
        if self.context_length < 3:
            raise RecipeError(f"context_length is {self.context_length}; it must be at least 3")
        if not 0 < self.init_logit_scale <= MAX_LOGIT_SCALE:
            raise RecipeError(f"init_logit_scale is {self.init_logit_scale}; it must be in (0, {MAX_LOGIT_SCALE:g}]")


class ImageTower(nn.Module):
    """The image encoder: a tower without a classifier, and a projection: pixels -> [B, embed_dim].

    Raises RecipeError for a tower that neither clipkit nor timm has, and for arguments that it refuses.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.trunk = _timm(config)
        if config.grad_checkpointing:
            _checkpoint_blocks(self.trunk, config.image_tower)
        conventions = config.conventions
        width = self._width(len(conventions.image_mean), config.image_size)
        self.projection = _projection(conventions.image_projection, width, config.embed_dim)
        self.register_buffer("mean", torch.tensor(conventions.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(conventions.image_std).view(1, -1, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _width(self, channels: int, size: int) -> int:
        """Width of the trunk's features for pictures of this side. Raises RecipeError if it does not take them."""
        self.trunk.eval()
        try:
            width = int(self.trunk(torch.zeros(1, channels, size, size)).shape[1])
        except (RuntimeError, AssertionError, ValueError) as error:
            raise RecipeError(f"this image tower does not take {size}x{size} pixels: {str(error)[:120]}") from None
        self.trunk.train()
        return width

    def check_size(self, image_size: int) -> None:
        """Raises RecipeError if the trunk does not take images of this side."""
        self._width(self.mean.shape[1], image_size)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S], or float in [0, 1] -> zero-mean, unit-variance float."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.projection(self.trunk(self.normalise(images)))
        return features


def _projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    if kind == "none":
        if width != embed_dim:
            raise RecipeError(
                f"without a projection embed_dim must be the image tower's width, {width}; it is {embed_dim}"
            )
        return nn.Identity()
    if kind == "mlp":
        hidden = nn.Linear(width, 2 * embed_dim)
        return nn.Sequential(hidden, nn.GELU(), nn.Linear(2 * embed_dim, embed_dim, bias=False))
    linear = nn.Linear(width, embed_dim, bias=kind == "bias")
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _timm(config: CLIPConfig) -> nn.Module:
    import timm

    name = config.image_tower
    if (
        name in TOWERS and name not in TOWERS.own and timm.is_model(name)
    ):  # it would change the model of old checkpoints
        raise RecipeError(f"image tower {name!r} ({TOWERS.entry(name).help}) has the name of a timm model; rename it")
    if config.image_tower not in TOWERS and not timm.is_model(config.image_tower):
        known = timm.list_models(f"*{config.image_tower.split('_')[0]}*") or [*TOWERS, *timm.list_models("resnet*")]
        raise RecipeError(f"timm has no model {config.image_tower!r}; {did_you_mean(config.image_tower, known[:12])}")
    arguments = dict(config.image_kwargs)
    try:
        try:  # transformers are built for one image size; CNNs refuse the argument
            return _create(config.image_tower, {"img_size": config.image_size, **arguments})
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return _create(config.image_tower, arguments)
    except Exception as error:  # timm's constructors raise whatever they run into
        raise RecipeError(
            f"cannot build image tower {config.image_tower!r} with {arguments}: {str(error)[:120]}"
        ) from None


def _checkpoint_blocks(trunk: Any, name: str) -> None:
    try:
        trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise RecipeError(f"image tower {name!r} has no gradient checkpointing; omit grad_checkpointing") from None


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    if name in TOWERS:
        own: nn.Module = TOWERS[name](**arguments)
        return own
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    return model


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which OpenAI's models were trained with (openai/CLIP, model.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class Block(nn.Module):
    """Pre-norm transformer block with GELU; self-attention, causal unless the conventions say otherwise."""

    def __init__(self, width: int, heads: int, conventions: Conventions) -> None:
        super().__init__()
        self.heads, self.causal = heads, conventions.text_attention == "causal"
        self.norm1, self.norm2 = (nn.LayerNorm(width, conventions.text_norm_eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden, activation = conventions.text_mlp_width or 4 * width, _ACTIVATIONS[conventions.text_activation]
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, kept: Tensor, batch: int, length: int) -> Tensor:
        """Packed tokens [T, W]; `kept` [T] are their places among the batch * length of the padded captions."""
        width = x.shape[1]
        qkv = self.qkv(self.norm1(x))  # [T, 3 W]
        padded = qkv.new_zeros(batch * length, 3 * width).index_copy(0, kept, qkv)
        q, k, v = padded.reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, heads, L, W / heads]
        x = x + self.out(attended.transpose(1, 2).reshape(batch * length, width)[kept])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTower(nn.Module):
    """The text encoder, a transformer: token ids [B, L] -> [B, embed_dim], projected from the first END token.

    Attention is causal, so tokens after END do not matter and are not computed: the captions of a batch are packed, one
    after the other, everywhere but in the attention itself. Ids may be on the CPU whatever the device of the weights;
    the ends of captions are then known without a synchronisation. Full attention (SigLIP) computes all tokens.
    """

    def __init__(self, config: CLIPConfig, vocab_size: int, end_id: int) -> None:
        super().__init__()
        width, layers, conventions = config.text_width, config.text_layers, config.conventions
        self.end_id, self.checkpointing, self.conventions = end_id, config.grad_checkpointing, conventions
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, conventions) for _ in range(layers))
        self.norm = nn.LayerNorm(width, conventions.text_norm_eps)
        self.projection = nn.Linear(width, config.embed_dim, bias=conventions.text_projection_bias)
        self._init(width, layers)

    def _init(self, width: int, layers: int) -> None:
        """openai/CLIP model.py, initialize_parameters: residual outputs shrink with depth."""
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.out.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.mlp[2].weight, std=width**-0.5 * (2 * layers) ** -0.5)  # type: ignore[arg-type]
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x, _, last = self._states(ids)
        features: Tensor = self.projection(self.norm(x[last]))
        return features

    def sequence(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, L] -> every token's features [B, L, W] after the last norm; where there are tokens, bool [B, L]."""
        if self.conventions.text_attention == "full":
            ids = F.pad(ids, (0, len(self.positions) - ids.shape[1]), value=self.conventions.pad_id)
        x, kept, _ = self._states(ids)
        inside = torch.zeros(ids.numel(), dtype=torch.bool, device=x.device).index_fill_(0, kept, True)
        states = x.new_zeros(ids.numel(), x.shape[1]).index_copy(0, kept, self.norm(x).to(x.dtype))
        return states.view(*ids.shape, -1), inside.view(ids.shape)  # [B * L, W] -> [B, L, W]

    def _states(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States of the tokens of captions after the blocks [T, W]; their places in B * L; each caption's last one."""
        if self.conventions.text_attention == "full":
            ids = F.pad(ids, (0, len(self.positions) - ids.shape[1]), value=self.conventions.pad_id)
        batch, length = ids.shape
        end = (ids == self.end_id).int().argmax(dim=1)  # first END of each row
        if self.conventions.text_pool == "last":
            end = torch.full_like(end, length - 1)
        if self.conventions.text_attention == "full" or torch.compiler.is_exporting():  # a graph has fixed shapes
            kept = torch.arange(batch * length, device=ids.device)
            last = torch.arange(batch, device=ids.device) * length + end
        else:
            inside = torch.arange(length, device=ids.device) <= end[:, None]
            kept = inside.flatten().nonzero().squeeze(1)  # [T] of B * L
            last = (end + 1).cumsum(dim=0) - 1
        tokens, places = ids.flatten()[kept], kept % length
        tokens, places, last, kept = (
            t.to(self.positions.device, non_blocking=True) for t in (tokens, places, last, kept)
        )
        x = self.tokens(tokens) + F.embedding(places, self.positions)  # [T, W]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, kept, batch, length, use_reentrant=False)
            else:
                x = block(x, kept, batch, length)
        return x, kept, last


class CLIP(nn.Module):
    """Both encoders, the logit scale, and for the sigmoid loss the logit bias.

    `encode_image` and `encode_text` return unit vectors, float32 [B, embed_dim], whatever the autocast.
    """

    def __init__(self, config: CLIPConfig, vocab_size: int, end_id: int) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config)
        self.text = TextTower(config, vocab_size, end_id)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_logit_scale)))
        if config.init_logit_bias is None:
            self.register_buffer("logit_bias", torch.zeros(()), persistent=False)
        else:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned value."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the scale back to at most 100 (Radford et al. 2021, section 2.5); to be called after each step."""
        self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (or float in [0, 1]) [B, 3, S, S] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.image(images).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [B, L], best left on the CPU -> unit vectors [B, embed_dim]."""
        return F.normalize(self.text(ids).float(), dim=-1)
