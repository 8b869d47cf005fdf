"""Progressive resizing: the first steps of a training see smaller images, which cost less.

Touvron et al. 2019 (arXiv 1906.06423); Tan & Le 2021 (arXiv 2104.00298, section 4).
"""

from __future__ import annotations

from clipkit.config import Recipe

_FRACTION = 0.6
"""Fraction of the steps that see the smaller images."""


def first_size(recipe: Recipe, image_size: int) -> tuple[int, int]:
    """Side of the images in the first steps, and how many steps see them."""
    return recipe.data.progressive_size or image_size, round(_FRACTION * recipe.run.steps)


def mean_over_steps(small: float, full: float) -> float:
    """Mean over a training of a quantity that is `small` for the smaller images and `full` for the others."""
    return _FRACTION * small + (1 - _FRACTION) * full
