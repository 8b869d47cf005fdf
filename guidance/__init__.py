"""Guidance: noise schedules, denoisers, the noise-aware CLIP, samplers, guiders, and images from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "clipkit.guidance":
    raise ImportError("import clipkit.guidance, not guidance: a module has one name")

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.guidance import guiders, samplers, schedule
    from clipkit.guidance.config import DrawRequest, GuidanceConfig, Start
    from clipkit.guidance.denoiser import Denoiser
    from clipkit.guidance.loading import load_denoiser
    from clipkit.guidance.pipeline import Drawn, Pipeline

__all__ = [
    "Denoiser",
    "DrawRequest",
    "Drawn",
    "GuidanceConfig",
    "Pipeline",
    "Start",
    "guiders",
    "load_denoiser",
    "samplers",
    "schedule",
]
_HOMES = {
    "clipkit.guidance": ["guiders", "samplers", "schedule"],
    "clipkit.guidance.config": ["DrawRequest", "GuidanceConfig", "Start"],
    "clipkit.guidance.denoiser": ["Denoiser"],
    "clipkit.guidance.loading": ["load_denoiser"],
    "clipkit.guidance.pipeline": ["Drawn", "Pipeline"],
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
