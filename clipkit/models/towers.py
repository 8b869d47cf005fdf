"""Towers, the trunks of image encoders: two residual networks for small pictures, and the blocks of any tower.

`model.image_tower` names an entry of `clipkit.registry.TOWERS` or a model of timm. An entry is called with
`model.image_kwargs` as keyword arguments, and with `img_size` if it accepts that, and returns a module with

- `forward`: pixels [B, 3, S, S], float, normalised by mean and standard deviation -> features [B, width];
- `feature_info`: as timm's, a list of {"module": name of a submodule, "num_chs": its width}, first stage to last. A
  stage is a block, an `nn.Sequential` of blocks, or has them as `blocks`. They are the units of FSDP, of layer-wise
  learning-rate decay and of the noise level's modulation, so every stage keeps the shape [B, num_chs, H, W] or
  [B, tokens, num_chs];
- `set_grad_checkpointing(True)`, only for `model.grad_checkpointing`.

The projection to the shared embedding is no part of it. Another package adds a tower by an entry point of the group
"clipkit.towers".

Towers made for 224 pixels shrink their input by four or more before their first block, and leave 32x32 pixels on 8x8
positions. `clipkit_resnet` keeps 16x16 of them; at its end, 4x4, a 3x3 convolution still has neighbours to look at.
`clipkit_resnet9` looks at all 32x32 before it pools, which costs time and gains accuracy (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import RecipeError


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """He et al. 2015 (arXiv 1512.03385, figure 5), with the pooled shortcut of ResNet-D (arXiv 1812.01187, figure 2c).

    The last BatchNorm's gain starts at zero (Goyal et al. 2017, section 5.1), so that the block starts as its shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)
        # An odd side is halved upwards, as the strided convolution does it.
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(pool, _conv(inputs, outputs, 1))
        nn.init.zeros_(self.second[1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class _Staged(nn.Module):
    """A stem and stages, the i-th (from 0) at S / 2^(i + 1); timm's `feature_info` says where they are."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(stem, nn.ReLU())
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, object]] = []

    def _add(self, width: int, *blocks: nn.Module) -> None:
        at = len(self.stages)
        self.stages.append(nn.Sequential(*blocks))
        self.feature_info.append({"num_chs": width, "reduction": 2 ** (at + 1), "module": f"stages.{at}"})

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> the mean over positions of the last stage's features, [B, channels[-1]]."""
        pooled: Tensor = self.stages(self.stem(x)).mean(dim=(2, 3))
        return pooled


class SmallResNet(_Staged):
    """A stem at S / 2, then stages of BasicBlocks, each at half the last's side.

    `in_chans` (timm's name) is not 3 for latents.
    """

    def __init__(
        self, channels: Sequence[int] = (48, 96, 256), depths: Sequence[int] = (1, 1, 1), in_chans: int = 3
    ) -> None:
        if len(channels) != len(depths) or not channels:
            raise ValueError(f"{len(channels)} channels for {len(depths)} depths; there is one of each for a stage")
        super().__init__(_conv(in_chans, channels[0], 3, 2))
        before = (channels[0], *channels[:-1])
        for i, (inputs, outputs, depth) in enumerate(zip(before, channels, depths, strict=True)):
            self._add(
                outputs,
                *(BasicBlock(outputs if j else inputs, outputs, 2 if i and j == 0 else 1) for j in range(depth)),
            )


class PooledResNet(_Staged):
    """A stem at S, then stages of a convolution, 2x2 max pooling and BasicBlocks.

    The plan of ResNet-9 (Page 2018, "How to train your ResNet"): features are made at the finer side and the strongest
    of four kept, where a strided convolution makes one of four. The first of `channels` are the stem's.
    """

    def __init__(
        self, channels: Sequence[int] = (32, 64, 192, 384), depths: Sequence[int] = (1, 1, 1), in_chans: int = 3
    ) -> None:
        if len(channels) != len(depths) + 1 or not depths:
            raise ValueError(
                f"{len(channels)} channels for {len(depths)} depths; a stage has one of each, the stem channels"
            )
        super().__init__(_conv(in_chans, channels[0], 3))
        for inputs, outputs, depth in zip(channels[:-1], channels[1:], depths, strict=True):
            conv, norm = _conv(inputs, outputs, 3)
            pooled = nn.Sequential(conv, nn.MaxPool2d(2), norm, nn.ReLU())
            self._add(outputs, pooled, *(BasicBlock(outputs, outputs, 1) for _ in range(depth)))


def residual_blocks(trunk: nn.Module) -> list[tuple[nn.Module, int]]:
    """The blocks of a tower with their widths, first to last.

    timm's feature_info names the stages of every family; a stage is a block, a Sequential of blocks, or has `.blocks`.
    Raises RecipeError for a tower without feature_info.
    """
    if (stages := getattr(trunk, "feature_info", None)) is None:
        raise RecipeError(f"image tower {type(trunk).__name__} has no feature_info, which names its blocks")
    found: list[tuple[nn.Module, int]] = []
    for info in stages:
        stage = trunk.get_submodule(info["module"])
        blocks = getattr(stage, "blocks", stage)
        children = list(blocks.children()) if isinstance(blocks, nn.Sequential) else [blocks]
        found += [(block, int(info["num_chs"])) for block in children]
    return found
