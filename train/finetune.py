"""Fine-tuning: trained weights to start from, locked encoders (LiT), layer-wise learning-rate decay.

The weights may be those of a run, or published ones in any form that `clipkit.load` takes. The recipe's [model] is then
taken from them, as far as it does not set its keys itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from clipkit import checkpoint
from clipkit.config import require
from clipkit.errors import CheckpointError, RecipeError
from clipkit.models.clip import CLIP
from clipkit.models.source import Source, open_source
from clipkit.models.tokenizer import AnyTokenizer, Tokenizer
from clipkit.models.towers import residual_blocks


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of a trained CLIP: the encoders taken from it, and those that are locked."""

    init_from: str = ""
    """CLIP to start from: a run or a release, "clipkit-tiny", a published name such as "ViT-B-32/laion2b_s34b_b79k",
    "hf-hub:organisation/name", or a folder or file of another library. Its tokenizer comes with its text encoder, and
    keys of [model] that the recipe does not set are taken from it."""
    init: Literal["both", "image", "text"] = "both"
    """Encoders whose weights are taken."""
    lock: Literal["none", "image", "text"] = "none"
    """Encoder that is not trained (LiT, locked-image tuning, Zhai et al. 2021, arXiv 2111.07991); its BatchNorms keep
    their statistics."""
    unlock_blocks: int = 0
    """Last blocks of the locked encoder that are trained nevertheless, with all layers after them."""
    layer_decay: float = 1.0
    """Layer-wise learning-rate decay: the rate of a block as a share of the rate of the block after it, so that early
    layers learn slower (ELECTRA, Clark et al. 2020, arXiv 2003.10555)."""

    def __post_init__(self) -> None:
        require("in (0, 1]", "finetune", self, "layer_decay")
        require("at least 0", "finetune", self, "unlock_blocks")
        if self.unlock_blocks and self.lock == "none":
            raise RecipeError(
                f"finetune.unlock_blocks is {self.unlock_blocks}, but no encoder is locked; give finetune.lock too"
            )
        if self.init != "both" and not self.init_from:
            raise RecipeError(
                f"finetune.init is {self.init!r}, but there is nothing to start from; give finetune.init_from too"
            )

    def source(self) -> Source | None:
        """The CLIP to start from, if any. Raises CheckpointError when there is none at `init_from`."""
        if not self.init_from:
            return None
        return _read.pop(self.init_from, None) or open_source(self.init_from)


_read: dict[str, Source] = {}
"""Published weights that the recipe read last starts from, until `FinetuneConfig.source` takes them."""


def open_for_recipe(init_from: str) -> Source:
    """The CLIP that a recipe starts from; published weights are kept for its training, so that they are read once."""
    _read.clear()
    source = open_source(init_from)
    if source.checkpoint is None:
        _read[init_from] = source
    return source


# The shape of the model, from the source

_SHAPE: dict[str, tuple[str, ...]] = {
    "image": ("image_tower", "image_kwargs", "image_size"),
    "text": ("text_width", "text_layers", "text_heads", "context_length"),
}
_CONVENTIONS: dict[str, tuple[str, ...]] = {
    "image": ("image_projection", "image_mean", "image_std", "image_resize", "image_fill", "image_interpolation"),
    "text": (
        "text_activation", "text_norm_eps", "text_mlp_width", "text_attention", "text_pool", "text_projection_bias",
        "text_cleaning", "pad_id",
    ),
}  # fmt: skip
_FREE = {"image_kwargs", "image_size", "image_resize", "image_fill", "image_interpolation"}
"""Keys that a recipe may set otherwise: they do not change what the weights mean, or their shapes are checked."""


def model_section(source: Source, given: Mapping[str, Any], init: str, sigmoid: bool) -> dict[str, Any]:
    """The recipe's [model], `given`, completed with the configuration of the CLIP from which the run starts.

    A logit bias is taken for the sigmoid loss only; InfoNCE does not depend on it.
    Raises RecipeError for a key that contradicts the weights.
    """
    parts = ("image", "text") if init == "both" else (init,)
    if "text" in parts and given.get("merges") and not _is_of(source.tokenizer, given["merges"]):
        raise RecipeError(
            f"model.merges names a vocabulary, and the text encoder of {source.name} has one; omit model.merges"
        )
    theirs = dataclasses.asdict(source.config)
    shape = {key: theirs[key] for key in ("embed_dim", *(key for part in parts for key in _SHAPE[part]))}
    if sigmoid and init == "both" and theirs["init_logit_bias"] is not None:
        shape["init_logit_bias"] = theirs["init_logit_bias"]
    conventions = {key: theirs["conventions"][key] for part in parts for key in _CONVENTIONS[part]}
    written = given.get("conventions", {})
    if not isinstance(written, Mapping):
        return dict(given)  # which is refused with the key's type
    merged = _completed(source, given, shape, "model")
    return {**merged, "conventions": _completed(source, written, conventions, "model.conventions")}


def _is_of(tokenizer: AnyTokenizer, merges: Any) -> bool:
    """Whether a tokenizer is CLIP's, of this file of merges; recipes of 0.1 name it beside the CLIP to start from."""
    if not isinstance(merges, str) or not Path(merges).is_file():
        return False
    return Tokenizer.clip(merges, tokenizer.context_length).to_json() == tokenizer.to_json()


def stored_section(out: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe's [model], `given`, completed with that of the run in the folder `out`; None where no run is.

    A resumed run keeps its shape, also if the keys that its recipe leaves out were once completed otherwise.
    """
    found = checkpoint.latest(Path(out), ()) if isinstance(out, str) else None
    conventions = given.get("conventions", {})
    if found is None or found.state.get("kind") != "clip" or not isinstance(conventions, Mapping):
        return None
    stored = found.state["recipe"]["model"]
    return {**stored, **given, "conventions": {**stored.get("conventions", {}), **conventions}}


def _completed(source: Source, given: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, value in theirs.items():
        value = list(value) if isinstance(value, tuple) else value
        own = list(given[key]) if isinstance(given.get(key), tuple) else given.get(key)
        if key in given and key not in _FREE and own != value:
            raise RecipeError(f"{where}.{key} is {own!r}, and {source.name} has {value!r}; omit it, or set it so")
    return {**theirs, **given}


# The weights


def initialise(clip: CLIP, config: FinetuneConfig, source: Source | None) -> None:
    """Fill `clip` with the weights of the model that it starts from: of a run, the averaged ones.

    A ViT's positions are interpolated to another image size. Raises CheckpointError naming a tensor that does not fit.
    """
    if source is None:
        return
    encoders = ("image", "text") if config.init == "both" else (config.init,)
    wanted = {n: t for n, t in clip.state_dict().items() if n.split(".")[0] in encoders}
    theirs = source.read()
    if config.init == "both":
        wanted["log_logit_scale"] = clip.log_logit_scale
        if isinstance(clip.logit_bias, nn.Parameter) and "logit_bias" in theirs:
            wanted["logit_bias"] = clip.logit_bias
    there = {n: _positions(n, t, clip.image.trunk) for n, t in theirs.items() if n in wanted}
    missing = [n for n in wanted if n not in there and not n.endswith("num_batches_tracked")]
    unlike = [
        f"{n} {_shape(there[n])} for {_shape(t)}" for n, t in wanted.items() if n in there and there[n].shape != t.shape
    ]
    if missing or unlike:
        what = f"lacks {missing[0]}" if missing else f"has {unlike[0]}"
        raise CheckpointError(
            f"{source.place} does not fit this model: it {what}; omit model.image_tower and model.image_kwargs, which "
            "are then taken from it"
        )
    clip.load_state_dict(there, strict=False)


def resized(clip: CLIP, image_size: int) -> CLIP:
    """The same CLIP for images of another size; a ViT's positions are interpolated."""
    made = CLIP(replace(clip.config, image_size=image_size), clip.text.tokens.num_embeddings, clip.text.end_id)
    made.load_state_dict({n: _positions(n, t, made.image.trunk) for n, t in clip.state_dict().items()})
    return made


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _positions(name: str, tensor: Tensor, trunk: Any) -> Tensor:
    """A ViT's position embedding, for the number of patches that `trunk` has; any other tensor unchanged."""
    if name != "image.trunk.pos_embed" or tensor.shape == trunk.pos_embed.shape:
        return tensor
    from timm.layers import resample_abs_pos_embed

    resized: Tensor = resample_abs_pos_embed(
        tensor, trunk.patch_embed.grid_size, num_prefix_tokens=trunk.num_prefix_tokens
    )
    return resized


# Locked encoders and layer-wise learning rates


def depths(clip: CLIP) -> tuple[dict[str, int], dict[str, int]]:
    """Parameter name -> depth, of the image tower and of the text tower.

    0 for embeddings and stems, i for the i-th block, and the number of blocks plus 1 for layers after them.
    """
    image = [block for block, _ in residual_blocks(clip.image.trunk)]
    return _depths("image", clip.image, image), _depths("text", clip.text, list(clip.text.blocks))


def _depths(prefix: str, tower: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """By order of registration, which is the order of execution in timm's models."""
    owner = {id(p): i + 1 for i, block in enumerate(blocks) for p in block.parameters()}
    found = {}
    deepest = 0
    for name, parameter in tower.named_parameters():
        deepest = max(deepest, owner.get(id(parameter), 0))
        after = deepest == len(blocks) and id(parameter) not in owner
        found[f"{prefix}.{name}"] = len(blocks) + 1 if after else owner.get(id(parameter), deepest)
    return found


def lr_scales(clip: CLIP, config: FinetuneConfig) -> dict[str, float]:
    """Layer-wise learning-rate decay: parameter name -> multiple of the learning rate, smallest in early layers."""
    return {n: config.layer_decay ** (max(tower.values()) - d) for tower in depths(clip) for n, d in tower.items()}


def lock(clip: CLIP, config: FinetuneConfig) -> None:
    """Turn off the gradients of the locked tower's parameters."""
    if config.lock == "none":
        return
    tower = depths(clip)[config.lock == "text"]
    first_trained = max(tower.values()) - config.unlock_blocks if config.unlock_blocks else max(tower.values()) + 1
    for name, parameter in clip.named_parameters():
        if name in tower:
            parameter.requires_grad_(tower[name] >= first_trained)


def eval_locked(model: nn.Module) -> None:
    """Evaluation mode for every module whose parameters are all locked: fixed BatchNorm statistics, no dropout."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
