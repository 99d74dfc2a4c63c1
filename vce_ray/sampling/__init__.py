"""Sampling of image tokens with a fixed number of steps. `draw` is the entry point."""

from vce_ray.sampling.draw import draw

__all__ = ["draw"]
