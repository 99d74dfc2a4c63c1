"""Render the HTML templates of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vce_ray.evaluation.formats import change, change_interval, interval, limit, percent, points, short

FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": points,
    "interval": interval,
    "change": change,
    "change_interval": change_interval,
    "limit": limit,
    "short": short,
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
