"""Guidance: noise schedules, denoisers, the noise-aware CLIP, samplers, guiders, and images from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "clipkit.guidance":
    raise ImportError("import clipkit.guidance, not guidance: a module has one name")

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.guidance import guiders, samplers, schedule
    from clipkit.guidance.config import Start, Steering
    from clipkit.guidance.denoiser import Denoiser
    from clipkit.guidance.loading import load_denoiser
    from clipkit.guidance.pipeline import Studio

__all__ = [
    "Denoiser",
    "Start",
    "Steering",
    "Studio",
    "guiders",
    "load_denoiser",
    "samplers",
    "schedule",
]
_HOMES = {
    "clipkit.guidance": ["guiders", "samplers", "schedule"],
    "clipkit.guidance.config": ["Start", "Steering"],
    "clipkit.guidance.denoiser": ["Denoiser"],
    "clipkit.guidance.loading": ["load_denoiser"],
    "clipkit.guidance.pipeline": ["Studio"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
