"""The fixed-length decoder for image tokens: `draw` is its door."""

from vce_ray.sampling.draw import draw

__all__ = ["draw"]
