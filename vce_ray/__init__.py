"""vce_ray: erases concepts from autoregressive image generators by Visual Contrast Exploitation, on Ray.

    import vce_ray

    erasure = vce_ray.erase("deer", store="runs")
    model = vce_ray.load_model(adapter=erasure.adapter)
    vce_ray.draw(model, "a deer on a blue background")

docs/python.md has more. Names are imported on first use, so `import vce_ray` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vce_ray.api import Erasure, draw, erase, evaluate, load_model, make_pairs, status
    from vce_ray.concepts.concept import Concept
    from vce_ray.concepts.load import catalogue, load_concept
    from vce_ray.errors import UserError
    from vce_ray.storage.errors import StoreError
    from vce_ray.storage.store import Store

__version__ = "0.1.0"

_MODULES = {
    "vce_ray.api": ("Erasure", "draw", "erase", "evaluate", "load_model", "make_pairs", "status"),
    "vce_ray.concepts.concept": ("Concept",),
    "vce_ray.concepts.load": ("catalogue", "load_concept"),
    "vce_ray.errors": ("UserError",),
    "vce_ray.storage.errors": ("StoreError",),
    "vce_ray.storage.store": ("Store",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Concept",
    "Erasure",
    "Store",
    "StoreError",
    "UserError",
    "catalogue",
    "draw",
    "erase",
    "evaluate",
    "load_concept",
    "load_model",
    "make_pairs",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
