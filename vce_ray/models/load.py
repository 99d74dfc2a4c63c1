"""Load a base model. Only the functions import torch, so importing this module is cheap."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from vce_ray.config import EMBEDDED
from vce_ray.models.check import check_folder
from vce_ray.models.folder import model_dtype, model_folder

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel


@cache
def base_model(ref: str) -> ImageModel:
    """Return a frozen base model, loaded once per process. All callers share it: never train it or add an adapter."""
    return load_model(ref)


def load_model(
    ref: str = EMBEDDED, device: str | None = None, adapter: Path | None = None, dtype: str | None = None
) -> ImageModel:
    """Load a base model for sampling, and merge an adapter into it if one is given.

    Args:
        ref: as for `model_folder`.
        device: the GPU visible to this process by default, or the CPU if there is none.
        adapter: folder written by `save_adapter`.
        dtype: dtype of the weights, such as 'bfloat16'. By default, the one that the checkpoint names, or is stored in.

    Raises:
        UserError: the reference is unknown; the checkpoint is incomplete, damaged, quantized or of an unknown family;
            or the adapter is damaged or belongs to another revision of the base.
    """
    import torch

    folder = model_folder(ref)
    model_class = resolve_name(check_folder(folder, ref).model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model_class.from_folder(folder, device, getattr(torch, dtype or model_dtype(folder)))
    model.ref = ref
    if adapter is not None:
        from vce_ray.models.adapter import attach_adapter, merge_adapter  # importing peft takes seconds

        attach_adapter(model, adapter)
        merge_adapter(model.net)
    return model
