"""Choices in classifier guidance by the noise-aware CLIP, light to import: its objective, and the gradient's target."""

from typing import Literal

Objective = Literal["softmax", "dot"]
"""log p of the prompt among negative captions, or 100 times the cosine similarity (GLIDE)."""
Shift = Literal["score", "mean"]
"""The score, or each step's mean, as in ADM and GLIDE."""
