"""vce_ray: erases concepts from autoregressive image generators by Visual Contrast Exploitation, on Ray."""

__version__ = "0.1.0"
