"""Fixtures shared by the serving tests: the embedded model and an adapter for it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_model() -> str:
    """Name of the embedded model. Skips the test if its weights are missing."""
    from vce_ray.models.folder import model_folder

    if not (model_folder("emoji-world") / "model.safetensors").exists():
        pytest.skip("the embedded model has no weights here")
    return "emoji-world"


@pytest.fixture(scope="session")
def adapter(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, large enough to change images."""
    import torch

    from vce_ray.models.adapter import adapter_state, add_lora, save_adapter
    from vce_ray.models.load import load_model

    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(base_model)
    add_lora(model.net, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in adapter_state(model.net).items()}
    save_adapter(folder, state, model.revision, {"rank": 2, "alpha": 4}, {"concept": "deer"})
    return folder
