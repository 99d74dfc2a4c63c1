"""Renders scenes, a sprite on a coloured background: the training images of all models of the emoji world."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tools.emoji_world.sprites import SIZE as SPRITE
from tools.emoji_world.world import BACKGROUNDS, STYLES, THINGS, Scene

SHEET = Path(__file__).parents[2] / "vce_ray/models/emoji_world/sprites.png"
EDGE = 64
"""Edge of an image in pixels."""
SCALES = (42, 46, 50)
"""Possible edges of a rendered sprite in pixels."""
SHIFT = 2
"""Maximum offset of a sprite from the centre in pixels, in each direction."""


@cache
def _sprites(scale: int) -> np.ndarray:
    """Return all sprites at one scale with premultiplied alpha: float32 [object, style, scale, scale, RGBA in 0..1]."""
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"), np.float32) / 255
    sheet[..., :3] *= sheet[..., 3:]
    sheet = sheet.reshape(len(THINGS), SPRITE, len(STYLES), SPRITE, 4).swapaxes(1, 2)
    out = np.empty((len(THINGS), len(STYLES), scale, scale, 4), np.float32)
    for index in np.ndindex(out.shape[:2]):
        for channel in range(4):
            plane = Image.fromarray(sheet[index][..., channel])
            out[(*index, slice(None), slice(None), channel)] = np.asarray(
                plane.resize((scale, scale), Image.Resampling.BOX if scale * 2 == SPRITE else Image.Resampling.HAMMING)
            )
    return out.clip(0, 1)


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """Render the scene with random placement and scale: uint8 [EDGE, EDGE, 3]."""
    canvas = np.empty((EDGE, EDGE, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    if scene.thing is not None:
        scale = rng.choice(SCALES)
        top, left = ((EDGE - scale) // 2 + rng.randint(-SHIFT, SHIFT) for _ in range(2))
        sprite = _sprites(scale)[scene.thing, scene.style]
        window = canvas[top : top + scale, left : left + scale]
        window *= 1 - sprite[..., 3:]
        window += sprite[..., :3]
    for inset, level in ((0, 1.0), (1, 0.12)):  # a white margin with a dark frame inside it
        canvas[inset], canvas[-1 - inset], canvas[:, inset], canvas[:, -1 - inset] = (level,) * 4
        if inset:
            canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1] = (1.0,) * 4
    return (canvas * 255 + 0.5).astype(np.uint8)


def held_out(number: int, seed: int = 20_000_003) -> list[tuple[Scene, np.ndarray]]:
    """Return images for evaluation: every (object, style) pair in turn, placements and colours from `seed`.

    Training uses other seeds. With 3 scales, 25 positions and 8 backgrounds an image may still coincide with a training
    image, so 'held out' means sampled independently, not guaranteed to be unseen.
    """
    rng = random.Random(seed)
    pairs = [(thing, style) for thing in range(len(THINGS)) for style in range(len(STYLES))]
    scenes = [Scene(*pairs[i % len(pairs)], rng.choice(tuple(BACKGROUNDS))) for i in range(number)]
    return [(scene, render(scene, rng)) for scene in scenes]
