"""Autoencoders for latent diffusion: VAE (KL term) and VQ-VAE (codebook), with f = 2, 4 or 8, and a discriminator.

The layers are those of latent diffusion's (Rombach et al. 2022, arXiv 2112.10752, appendix G; Esser et al. 2021, arXiv
2012.09841), so that a folder of diffusers' AutoencoderKL can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import from_dict, require
from clipkit.convert import unpickling
from clipkit.convert.layouts import diffusers_autoencoder
from clipkit.errors import CheckpointError, RecipeError
from clipkit.io import only_known, read_object


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder."""

    image_size: int = 64
    """Side of the square images, in pixels."""
    channels: int = 32
    """Width at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Width at each resolution, in multiples of `channels`; each next one halves the side: three make f = 4."""
    blocks: int = 1
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    latent_channels: int = 4
    """Channels of the latents."""
    kind: Literal["kl", "vq"] = "kl"
    """"kl": a VAE, latents near a standard normal. "vq": a VQ-VAE, latents from a codebook."""
    codes: int = 1024
    """Entries of the codebook."""
    groups: int = 32
    """Groups of the normalisation."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "channels", "blocks", "latent_channels", "codes", "groups")
        require("at least 1", "autoencoder", self, *sizes)
        if not self.multipliers or min(self.multipliers) < 1:
            raise RecipeError(
                f"autoencoder.multipliers are {list(self.multipliers)}; give one of at least 1 for each resolution"
            )
        if self.image_size % self.factor:
            raise RecipeError(f"image_size {self.image_size} does not divide by {self.factor}; choose a multiple of it")
        if self.channels % self.groups:
            raise RecipeError(f"channels is {self.channels}; it must be a multiple of groups, {self.groups}")

    @property
    def factor(self) -> int:
        """Downsampling factor f."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def latent_size(self) -> int:
        """Side of the latents."""
        return self.image_size // self.factor


_DEAD = 0.01
"""Mean uses per step below which a code is reset."""


@dataclass(frozen=True)
class LatentConfig:
    """The space of a denoiser: pixels or latents."""

    autoencoder: str = ""
    """Run of the autoencoder whose latents are denoised, or a folder of diffusers' AutoencoderKL; none for pixels."""


class _Residual(nn.Module):
    """GroupNorm, SiLU, conv, twice, and a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class _Attention(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, H*W, C]
        attended = F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))
        out: Tensor = x + self.out(attended[:, 0]).transpose(1, 2).reshape(b, c, h, w)
        return out


class _Down(nn.Conv2d):
    """Stride-2 convolution, padded at the right and below only, as in latent diffusion."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Conv2d):
    """Nearest upsampling by 2, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(_Residual(width, width, groups), _Attention(width, groups), _Residual(width, width, groups))


class Encoder(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> [B, outputs, S / f, S / f]."""

    def __init__(self, config: AutoencoderConfig, outputs: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.stem, self.levels, width = nn.Conv2d(3, widths[0], 3, padding=1), nn.ModuleList(), widths[0]
        for i, out in enumerate(widths):
            blocks = [_Residual(width if j == 0 else out, out, config.groups) for j in range(config.blocks)]
            width = out
            self.levels.append(nn.Sequential(*blocks, *([_Down(out)] if i < len(widths) - 1 else [])))
        self.middle = _middle(width, config.groups)
        self.norm, self.head = nn.GroupNorm(config.groups, width, eps=1e-6), nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        out: Tensor = self.head(F.silu(self.norm(self.middle(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, C, s, s] -> images [B, 3, f s, f s]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.stem, width = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), widths[0]
        self.middle, self.levels = _middle(width, config.groups), nn.ModuleList()
        for i, out in enumerate(widths):
            blocks = [_Residual(width if j == 0 else out, out, config.groups) for j in range(config.blocks + 1)]
            width = out
            self.levels.append(nn.Sequential(*blocks, *([_Up(out)] if i < len(widths) - 1 else [])))
        self.norm, self.head = nn.GroupNorm(config.groups, width, eps=1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.head(self.before_head(z))
        return out

    def before_head(self, z: Tensor) -> Tensor:
        """Input of the last convolution."""
        x = self.middle(self.stem(z))
        for level in self.levels:
            x = level(x)
        return F.silu(self.norm(x))


class Codebook(nn.Module):
    """Vectors [K, C]: exponential moving averages of the latents quantised to them (van den Oord et al. 2017, arXiv
    1711.00937, appendix A.1).

    No gradients: `gather` accumulates a step's statistics, and `follow` updates the vectors after the step.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, channels: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        start = torch.randn(codes, channels)
        self.register_buffer("vectors", start)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", start.clone())
        self._fresh = torch.zeros(codes, channels + 1)
        self._seen: Tensor | None = None

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, C, s, s] -> its nearest vectors, and their numbers [B, s, s]."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # [B s s, C]
        numbers = torch.cdist(flat, self.vectors).argmin(dim=1)
        shape = (len(z), *z.shape[2:])
        return self.vectors[numbers].view(*shape, -1).permute(0, 3, 1, 2), numbers.view(shape)

    @torch.no_grad()
    def gather(self, z: Tensor, numbers: Tensor) -> None:
        """Accumulate the statistics of this step."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()
        rows = torch.cat([flat, torch.ones(len(flat), 1, device=flat.device)], dim=1)
        self._fresh = self._fresh.to(flat.device).index_add(0, numbers.flatten(), rows)
        self._seen = flat

    @torch.no_grad()
    def follow(self) -> Tensor:
        """Update the vectors -> the share of them that was used in this step, over all ranks.

        Unused vectors are reset to latents of this step.
        """
        fresh = distributed.sum_over_ranks(self._fresh)
        used, sums = fresh[:, -1], fresh[:, :-1]
        self.counts.lerp_(used, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.vectors.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        dead = self.counts < _DEAD
        if bool(dead.any()) and self._seen is not None:
            drawn = self._seen[torch.randint(len(self._seen), (int(dead.sum()),), device=dead.device)]
            drawn = distributed.sum_over_ranks(drawn if distributed.rank() == 0 else torch.zeros_like(drawn))
            self.vectors[dead], self.sums[dead], self.counts[dead] = drawn, drawn, 1.0
        self._fresh = torch.zeros_like(self._fresh)
        return (used > 0).float().mean()


class Encoded(NamedTuple):
    """Latents for the decoder, and each picture's regularisation loss [B]: KL, or commitment."""

    z: Tensor
    loss: Tensor


class Autoencoder(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] <-> latents [B, C, S / f, S / f] of unit variance.

    `encode` and `decode` are for inference; `embed` is for training, and samples the latents of a VAE.
    """

    spread: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, channels = config, config.latent_channels
        moments = 2 * channels if config.kind == "kl" else channels
        self.encoder, self.decoder = Encoder(config, moments), Decoder(config)
        self.before, self.after = nn.Conv2d(moments, moments, 1), nn.Conv2d(channels, channels, 1)
        self.codebook = Codebook(config.codes, channels) if config.kind == "vq" else None
        self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of unit variance for a denoiser: the mean, or the nearest codes, over their standard deviation."""
        moments = self.before(self.encoder(images))
        if self.codebook is not None:
            return self.codebook.nearest(moments)[0] / self.spread
        return moments.chunk(2, dim=1)[0] / self.spread  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """Latents of unit variance -> images; for a codebook they are quantised first."""
        z = z * self.spread
        if self.codebook is not None:
            z = self.codebook.nearest(z)[0]
        out: Tensor = self.decoder(self.after(z))
        return out

    def embed(self, images: Tensor) -> Encoded:
        """Latents for training: z ~ N(mean, std) with its KL to N(0, 1), or codes with their commitment loss.

        Kingma & Welling 2014 (arXiv 1312.6114, appendix B); van den Oord et al. 2017, equation 3.
        """
        moments = self.before(self.encoder(images)).float()
        if self.codebook is None:
            mean, log_variance = moments.chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(dim=1)
            return Encoded(z, kl)
        near, numbers = self.codebook.nearest(moments)
        if self.training and torch.is_grad_enabled():
            self.codebook.gather(moments, numbers)
        commitment = (moments - near.detach()).square().flatten(1).mean(dim=1)
        return Encoded(moments + (near - moments).detach(), commitment)  # straight through


_DIFFUSERS = "diffusion_pytorch_model.safetensors"


def is_diffusers(folder: Path) -> bool:
    """Are there weights as diffusers saves them?"""
    return (folder / _DIFFUSERS).is_file()


def from_diffusers(folder: Path) -> Autoencoder:
    """An AutoencoderKL that diffusers saved: config.json and its weights. Raises CheckpointError for another model."""
    about = read_object(folder / "config.json")
    if about.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(f"{folder} holds a {about.get('_class_name')}; an AutoencoderKL is needed")
    (config, scale), file = _from_config(about, folder / "config.json"), folder / _DIFFUSERS
    model = Autoencoder(config)
    try:
        tensors = diffusers_autoencoder(config.blocks).to_ours(unpickling.read(file).tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    tensors["spread"] = torch.tensor(1 / scale)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:120]
        raise CheckpointError(f"{file} holds another architecture: {first}") from None
    return model.eval().requires_grad_(False)


# The arguments of diffusers' AutoencoderKL: those that are read, with their defaults there, and what is built in here.
_USED: dict[str, Any] = {
    "block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32,
    "scaling_factor": 0.18215, "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
}  # fmt: skip
_BUILT_IN: dict[str, Sequence[Any]] = {
    "_class_name": ("AutoencoderKL",), "in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",),
    "shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,), "use_quant_conv": (True,),
    "use_post_quant_conv": (True,), "mid_block_add_attention": (True,),
}  # fmt: skip
_FREE = {"_diffusers_version", "_name_or_path", "force_upcast"}  # here it is float32 anyway


def _from_config(about: Mapping[str, Any], file: Path) -> tuple[AutoencoderConfig, float]:
    """The shape, and the scaling factor of latents."""
    if isinstance(size := about.get("sample_size"), list):
        if len(set(size)) != 1:
            raise CheckpointError(f"{file}: sample_size is {size}; clipkit has square images only")
        about = {**about, "sample_size": size[0]}
    try:
        found = only_known(about, "", _USED, _BUILT_IN, _FREE)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    widths, scale = found["block_out_channels"], float(found["scaling_factor"])
    for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(found[key]) != [known] * len(widths):
            raise CheckpointError(f"{file}: {key} is {found[key]}; clipkit has {known} only, one for each width")
    if scale <= 0:
        raise CheckpointError(f"{file}: scaling_factor is {scale}; it must be above 0")
    try:
        if any(width % widths[0] for width in widths):
            raise RecipeError(f"block_out_channels are {widths}; all must be multiples of the first")
        shape = {
            "image_size": found["sample_size"],
            "channels": widths[0],
            "multipliers": tuple(width // widths[0] for width in widths),
            "blocks": found["layers_per_block"],
            "latent_channels": found["latent_channels"],
            "groups": found["norm_num_groups"],
        }
        return from_dict(AutoencoderConfig, shape), scale
    except (TypeError, IndexError, ArithmeticError, RecipeError) as error:
        raise CheckpointError(f"{file} describes no autoencoder that clipkit has: {error}") from None


class Discriminator(nn.Module):
    """PatchGAN, a logit for each patch: [B, 3, S, S] -> [B, 1, ., .] (Isola et al. 2017, arXiv 1611.07004).

    The first `layers` convolutions halve the side, or as many of them as leave a patch of images of `image_size`.
    """

    def __init__(self, channels: int = 32, layers: int = 3, image_size: int = 64) -> None:
        super().__init__()
        # Each convolution halves the side or takes one from it, and at least one place must be left by all.
        halvings = max((n for n in range(layers + 1) if image_size >> n >= layers - n + 3), default=0)
        found: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2 if halvings else 1, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            wider = channels * min(2**i, 8)
            # Group rather than batch statistics: a score depends on its own picture alone.
            stride = 2 if i < halvings else 1
            found += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*found, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


SMALLEST = 6
"""Side of the smallest pictures that the discriminator takes."""


def frozen_scores(discriminator: nn.Module, images: Tensor) -> Tensor:
    """The discriminator's mean score of each image [B], with gradients to the images and none to its weights."""
    weights: Mapping[str, Any] = {name: p.detach() for name, p in discriminator.named_parameters()}
    scores: Tensor = torch.func.functional_call(discriminator, dict(weights), (images,))
    return scores.flatten(1).mean(dim=1)
