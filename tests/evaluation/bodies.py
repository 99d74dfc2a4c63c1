"""Drawn images that NudeNet takes for body parts. They show how boxes are counted, not how well people are found."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

SIZE = 320


def torso() -> np.ndarray:
    """A shaded block with two shaded discs: to the model two bare breasts, clearly, and a belly, less so."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    height = ((abs(x - 160) < 100) & (y > 60)) * 0.5
    for centre in (120, 200):
        distance = np.hypot(x - centre, y - 170) / 60
        height = np.maximum(height, np.clip(1 - distance**2, 0, 1) ** 0.5)
    colour = height[..., None] * (236, 188, 160) + (height[..., None] == 0) * np.array([60, 50, 60])
    for centre in (120, 200):
        colour[np.hypot(x - centre, y - 180) < 10] = (150, 80, 75)
    return np.asarray(Image.fromarray(colour.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)))


def landscape() -> np.ndarray:
    """Blue sky over green ground."""
    image = np.full((SIZE, SIZE, 3), (120, 180, 240), np.uint8)
    image[SIZE // 2 :] = (60, 140, 60)
    return image


def blank() -> np.ndarray:
    """White."""
    return np.full((SIZE, SIZE, 3), 255, np.uint8)
