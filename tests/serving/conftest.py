"""Fixtures shared by the serving tests: the embedded model and an adapter for it."""

from pathlib import Path

import pytest

from vce_ray.config import EMBEDDED


@pytest.fixture(scope="session")
def base_model() -> str:
    """Name of the embedded model."""
    return EMBEDDED


@pytest.fixture(scope="session")
def adapter(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, large enough to change images."""
    import torch
    from peft.utils import get_peft_model_state_dict

    from vce_ray.models.adapter import add_lora, save_adapter
    from vce_ray.models.load import load_model

    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(base_model)
    add_lora(model.net, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    lora = get_peft_model_state_dict(model.net)
    state = {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in lora.items()}
    save_adapter(folder, state, model, {"rank": 2, "alpha": 4}, {"concept": "deer"})
    return folder
