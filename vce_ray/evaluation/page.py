"""Render the HTML templates of this package."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vce_ray.evaluation.formats import change, change_interval, duration, interval, percent, points, short


def flags(text: str) -> Markup:
    """Escape a text and mark its flags, such as --steps, as code."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": points,
    "interval": interval,
    "change": change,
    "change_interval": change_interval,
    "duration": duration,
    "short": short,
    "flags": flags,
}


def render(template: str, **values: Any) -> str:
    """Return a page made from a file of `templates/`.

    All values are escaped unless they are Markup, and a name that the template uses but `values` lacks is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template).render(values)
