"""Guidance: noise schedules, denoisers, the noise-aware CLIP, samplers, guiders, and pictures drawn from prompts."""

if __name__ != "clipkit.guidance":
    raise ImportError("import clipkit.guidance, not guidance: a module has one name")
