"""Pictures as rows carry them: PNG bytes, never float arrays."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image


def to_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [H, W, 3] picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(images: Iterable[bytes]) -> np.ndarray:
    """Pictures of one size as uint8 [B, H, W, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
