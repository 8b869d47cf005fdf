"""Fine-tuning: initial weights from another CLIP, locked towers (LiT), and layer-wise learning-rate decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from clipkit.checkpoint import Checkpoint
from clipkit.config import require
from clipkit.errors import CheckpointError, RecipeError
from clipkit.models import pretrained
from clipkit.models.clip import CLIP
from clipkit.models.towers import residual_blocks


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning: which weights to start from, which to lock, and slower learning rates of early layers."""

    init_from: str = ""
    """Run of a CLIP to start from; its tokenizer comes with its text tower."""
    init: Literal["both", "image", "text"] = "both"
    """Towers to initialise from it."""
    lock: Literal["none", "image", "text"] = "none"
    """Tower to lock (LiT, Zhai et al. 2021, arXiv 2111.07991): not trained, its BatchNorm statistics fixed."""
    unlock_blocks: int = 0
    """Last blocks of the locked tower to train all the same, with everything after them."""
    layer_decay: float = 1.0
    """Layer-wise learning-rate decay: a block's rate as a fraction of the next block's, so that early layers learn
    slower (ELECTRA, Clark et al. 2020, arXiv 2003.10555). 1: all alike."""

    def __post_init__(self) -> None:
        require("in (0, 1]", "tune", self, "layer_decay")
        require("at least 0", "tune", self, "unlock_blocks")
        if self.unlock_blocks and self.lock == "none":
            raise RecipeError(
                f"finetune.unlock_blocks is {self.unlock_blocks}, and no tower is locked; set finetune.lock"
            )
        if self.init != "both" and not self.init_from:
            raise RecipeError(
                f"finetune.init is {self.init!r}, and finetune.init_from names no CLIP to start from; set it"
            )

    @property
    def source(self) -> Checkpoint | None:
        """The checkpoint to start from, if any. Raises CheckpointError when that is not a CLIP."""
        return pretrained.find(self.init_from, "clip") if self.init_from else None


def depths(clip: CLIP) -> tuple[dict[str, int], dict[str, int]]:
    """Parameter name -> depth, of the image tower and of the text tower.

    0 for embeddings and stems, i for the i-th block, and the number of blocks plus 1 for layers after them.
    """
    image = [block for block, _ in residual_blocks(clip.image.trunk)]
    return _depths("image", clip.image, image), _depths("text", clip.text, list(clip.text.blocks))


def _depths(prefix: str, tower: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """By order of registration, which is the order of execution in timm's models."""
    owner = {id(p): i + 1 for i, block in enumerate(blocks) for p in block.parameters()}
    found, deepest = {}, 0
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


def initialise(clip: CLIP, config: FinetuneConfig) -> None:
    """Load the averaged weights of the CLIP to start from.

    A ViT's position embedding is interpolated to another image size. Raises CheckpointError naming a tensor that does
    not fit.
    """
    if (found := config.source) is None:
        return
    towers = ("image", "text") if config.init == "both" else (config.init,)
    wanted = {n: t for n, t in clip.state_dict().items() if n.split(".")[0] in towers}
    if config.init == "both":
        wanted["log_logit_scale"] = clip.log_logit_scale
    there = {n: _positions(n, t, clip.image.trunk) for n, t in found.tensors("ema").items() if n in wanted}
    missing = [n for n in wanted if n not in there]
    unlike = [
        f"{n} {_shape(there[n])} for {_shape(t)}" for n, t in wanted.items() if n in there and there[n].shape != t.shape
    ]
    if missing or unlike:
        what = f"lacks {missing[0]}" if missing else f"has {unlike[0]}"
        raise CheckpointError(
            f"{found.path} does not fit this model: it {what}; give finetune.init_from a run with these towers"
        )
    clip.load_state_dict(there, strict=False)


def resized(clip: CLIP, image_size: int) -> CLIP:
    """The same CLIP for another image size; a ViT's position embedding is interpolated."""
    made = CLIP(replace(clip.config, image_size=image_size), clip.text.tokens.num_embeddings, clip.text.end_id)
    made.load_state_dict({n: _positions(n, t, made.image.trunk) for n, t in clip.state_dict().items()})
    return made


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _positions(name: str, tensor: Tensor, trunk: Any) -> Tensor:
    """A ViT's position embedding, interpolated to the patches of `trunk`; any other tensor as it is."""
    if name != "image.trunk.pos_embed" or tensor.shape == trunk.pos_embed.shape:
        return tensor
    from timm.layers import resample_abs_pos_embed

    resized: Tensor = resample_abs_pos_embed(
        tensor, trunk.patch_embed.grid_size, num_prefix_tokens=trunk.num_prefix_tokens
    )
    return resized
