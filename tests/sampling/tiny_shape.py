"""The shape of a model small enough to work out its memory and time by hand."""

from __future__ import annotations

from vce_ray.models.shape import Shape

TINY = Shape("tiny", 2, 8, 2, 1, 16, 100, 10, 50, 1000, prompt_tokens=5, dtype="float32")
"""Two heads of width 4, which share one head of keys and values."""
