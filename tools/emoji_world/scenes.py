"""Puts a sprite on a coloured background: the pictures that everything in the emoji world learns from."""

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
"""Edge of a picture in pixels."""
SCALES = (42, 46, 50)
"""Edges in pixels at which a sprite is drawn."""
SHIFT = 2
"""A sprite lies at most this many pixels off the centre, in each direction."""


@cache
def _sprites(scale: int) -> np.ndarray:
    """All sprites at one scale, premultiplied: float32 [object, style, scale, scale, RGBA in 0..1]."""
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
    """One picture of the scene, placed and scaled at random: uint8 [EDGE, EDGE, 3]."""
    canvas = np.empty((EDGE, EDGE, 3), np.float32)
    canvas[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    if scene.thing is not None:
        scale = rng.choice(SCALES)
        top, left = ((EDGE - scale) // 2 + rng.randint(-SHIFT, SHIFT) for _ in range(2))
        sprite = _sprites(scale)[scene.thing, scene.style]
        window = canvas[top : top + scale, left : left + scale]
        window *= 1 - sprite[..., 3:]
        window += sprite[..., :3]
    for inset, level in ((0, 1.0), (1, 0.12)):  # a white margin, then a dark frame
        canvas[inset], canvas[-1 - inset], canvas[:, inset], canvas[:, -1 - inset] = (level,) * 4
        if inset:
            canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1] = (1.0,) * 4
    return (canvas * 255 + 0.5).astype(np.uint8)


def held_out(number: int, seed: int = 20_000_003) -> list[tuple[Scene, np.ndarray]]:
    """Pictures for measuring: every (object, style) pair in turn, placements and colours from `seed`.

    Training draws its placements from other seeds; with 3 scales and 25 places on 8 backgrounds single
    pictures can coincide, so 'held out' means newly drawn, not never possible.
    """
    rng = random.Random(seed)
    pairs = [(thing, style) for thing in range(len(THINGS)) for style in range(len(STYLES))]
    scenes = [Scene(*pairs[i % len(pairs)], rng.choice(tuple(BACKGROUNDS))) for i in range(number)]
    return [(scene, render(scene, rng)) for scene in scenes]
