"""Conversion of images to and from PNG, the format in which rows store them."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image


def to_png(image: np.ndarray) -> bytes:
    """Encode a uint8 [H, W, 3] image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(images: Iterable[bytes]) -> np.ndarray:
    """Decode PNG images of equal size to uint8 [B, H, W, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
