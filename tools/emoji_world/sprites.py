"""Render every object of every illustration set into one sprite sheet.

    python -m tools.emoji_world.sprites --sets node_modules --out vce_ray/models/emoji_world/sprites.png

Needs the npm packages @twemoji/svg 15.0.0, openmoji 17.0.0 and fluentui-emoji 1.3.0 below --sets, Debian's
fonts-noto-color-emoji 2.042, and cairosvg. The sheet ships with the package, so training and measuring need none of
them.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.emoji_world.world import STYLES, THINGS, Thing

SIZE = 96
"""Edge of one sprite in pixels: about twice its size in a scene, so that it stays sharp when scaled down."""
NOTO = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def _svg(path: Path) -> Image.Image:
    import cairosvg  # pyright: ignore[reportMissingImports]  # in the extra `tools`; not needed for training and tests

    png = cairosvg.svg2png(url=str(path), output_width=4 * SIZE, output_height=4 * SIZE)
    assert png is not None, "cairosvg returns bytes if no output file is given"
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _noto(thing: Thing) -> Image.Image:
    font = ImageFont.truetype(NOTO, 109)  # the only size of this bitmap font
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((12, 12), thing.emoji, font=font, embedded_color=True)
    return image


def draw(thing: Thing, style: str, sets: Path) -> Image.Image:
    """Render one object in one style, cropped to its ink and centred on a transparent square of SIZE pixels."""
    code = f"{ord(thing.emoji):X}"
    match style:
        case "noto":
            image = _noto(thing)
        case "twemoji":
            image = _svg(sets / "@twemoji/svg" / f"{code.lower()}.svg")
        case "openmoji":
            image = _svg(_variant(sets / "openmoji/color/svg", code))
        case "lineart":
            image = _svg(_variant(sets / "openmoji/black/svg", code))
        case "fluent":
            image = _svg(sets / "fluentui-emoji/icons/modern" / f"{thing.fluent}.svg")
        case "silhouette":
            image = _svg(sets / "fluentui-emoji/icons/high-contrast" / f"{thing.fluent}.svg")
        case _:
            raise ValueError(f"unknown style {style!r}: the styles are {', '.join(STYLES)}")
    image = image.crop(image.getbbox())
    edge = max(image.size)
    square = Image.new("RGBA", (edge, edge))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _variant(folder: Path, code: str) -> Path:
    plain = folder / f"{code}.svg"
    return plain if plain.exists() else folder / f"{code}-FE0F.svg"


def main() -> None:
    """Write the sheet: one row per object, one column per style."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sheet = Image.new("RGBA", (SIZE * len(STYLES), SIZE * len(THINGS)))
    for row, thing in enumerate(THINGS):
        for column, style in enumerate(STYLES):
            sheet.paste(draw(thing, style, args.sets), (SIZE * column, SIZE * row))
    sheet.save(args.out, optimize=True)
    print(f"{len(THINGS)} objects x {len(STYLES)} styles -> {args.out}")


if __name__ == "__main__":
    main()
