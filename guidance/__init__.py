"""Guidance: noise schedules, denoisers, the noise-aware CLIP, samplers, guiders, and pictures drawn from prompts."""
