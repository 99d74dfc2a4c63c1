"""The plan of a training against a measured step, and against what a real step runs and allocates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vce_ray.devices import CARDS, Device
from vce_ray.models.adapter import add_lora
from vce_ray.models.base import ImageModel
from vce_ray.models.load import load_model
from vce_ray.models.shape import SHAPES
from vce_ray.training.data import Share, TrainingData
from vce_ray.training.objectives import objective_for, train_config
from vce_ray.training.plan import activation_bytes, lora_parameters, plan_training
from vce_ray.training.terms.divergence import Targets
from vce_ray.training.trainable import in_own_dtype, make_trainable, recompute_layers, reference_context

PAIRS, KEPT = 6, 4
H200 = CARDS["h200"].device("bfloat16")
JANUS = SHAPES["janus-pro-7b"]


def test_the_measured_step() -> None:
    """12 pairs and 8 kept images of Janus-Pro-7B on an H200: 2.35 s, 24.7 GB (docs/run.md)."""
    planned = plan_training(JANUS, H200, train_config({"batch_size": 12, "keep_batch_size": 8, "prompt_mode": "given"}))
    assert planned.step_s < 2.35 and planned.expected_step_s == pytest.approx(2.35, rel=0.05)
    assert planned.peak_bytes == pytest.approx(24.7e9, rel=0.06) and planned.peak_bytes > 24.7e9
    assert planned.fits


def test_sharding_divides_weights_states_and_images() -> None:
    alone, shared = (plan_training(JANUS, H200, train_config({"num_workers": workers})) for workers in (1, 4))
    assert (alone.sharded, shared.sharded) == (False, True)
    assert (alone.images, shared.images) == (64, 16)
    assert shared.step_s == alone.step_s / 4
    assert shared.state_bytes == alone.state_bytes // 4 and shared.weight_bytes < alone.weight_bytes / 2
    assert alone.gathered_bytes == 0 < shared.gathered_bytes
    assert shared.peak_bytes == shared.loaded_bytes == alone.weight_bytes, "each worker loads the whole model first"
    replicated = plan_training(JANUS, H200, train_config({"num_workers": 4, "shard": False}))
    assert replicated.weight_bytes == alone.weight_bytes and not replicated.sharded


def test_all_weights_take_states_and_a_second_copy_of_the_base() -> None:
    full = plan_training(JANUS, H200, train_config({"weights": "full"}))
    assert full.trained_parameters == JANUS.step_parameters
    assert full.state_bytes == 6 * JANUS.step_parameters and full.base_bytes == full.loaded_bytes
    alone = plan_training(JANUS, H200, train_config({"weights": "full", "method": "dpo"}))
    assert alone.base_bytes == 0
    assert full.step_s > plan_training(JANUS, H200, train_config({})).step_s


def test_a_step_of_kernels_takes_at_least_their_launch() -> None:
    embedded = load_model(device="cpu").shape
    planned = plan_training(embedded, CARDS["h200"].device("float32"), train_config({}))
    assert planned.expected_step_s == pytest.approx(7 * 6 * 850e-6)


def training_data(model: ImageModel) -> TrainingData:
    def tokens(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(model.image_vocab_size, (PAIRS, model.num_image_tokens), generator=generator)

    log_probs = torch.full((PAIRS, model.num_image_tokens), -7.0)
    references = {mode: (log_probs, log_probs) for mode in ("given", "stripped", "null")}
    prompts, refined = ([f"{name} {i}" for i in range(PAIRS)] for name in ("a deer", "an animal"))
    return TrainingData(prompts, refined, tokens(0), tokens(1), references, prompts, tokens(2))


@pytest.mark.parametrize(
    "settings",
    [{"prompt_mode": "given"}, {"prompt_mode": "null"}, {}, {"anchor_weight": 0.0}, {"method": "dpo"}],
    ids=lambda settings: "-".join(map(str, settings.values())) or "mixed",
)
def test_passes_are_those_of_a_step(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch_size": PAIRS} | ({} if "method" in settings else {"keep_batch_size": KEPT})
    config = train_config(sizes | settings)
    model, objective = load_model(device="cpu"), objective_for(config)
    make_trainable(model.net, config)
    targets = Targets(model, reference_context(model, model), cache_bytes=0)
    images = {True: 0, False: 0}
    image_logits = model.image_logits

    def counted(*args: Any) -> torch.Tensor:
        images[torch.is_grad_enabled()] += len(args[1])
        return image_logits(*args)

    monkeypatch.setattr(model, "image_logits", counted)
    data, share, passes = training_data(model), Share(0, 1, seed=0), objective.passes
    steps = 6
    for step in range(steps):
        before = images[True]
        objective.loss(model, targets, objective.batch(data, step, share), step)
        assert images[True] - before <= passes.most
    assert images[True] / steps == pytest.approx(passes.trained, rel=0.1)
    assert images[False] / steps == passes.base


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are allocated inside it, and their peak.

    Args:
        known: tensors that exist before; their views take no memory.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("recomputed", [True, False])
def test_activations_are_those_of_a_step(weights: str, recomputed: bool) -> None:
    sizes = {"batch_size": PAIRS, "keep_batch_size": KEPT}
    config = train_config(sizes | {"weights": weights, "prompt_mode": "given"})
    model, objective = load_model(device="cpu"), objective_for(config)
    make_trainable(model.net, config)
    if recomputed:
        recompute_layers(model.net)
    targets = Targets(model, reference_context(model, model), cache_bytes=0)
    batch = objective.batch(training_data(model), 0, Share(0, 1, seed=0))
    known = [*model.net.parameters(), *model.net.buffers(), model.image_embeddings_VE]
    prompt_tokens = model.encode_prompts(["an animal 0"]).mask_BP.shape[1]
    with PeakMemory(known) as memory, in_own_dtype(model.net):
        objective.loss(model, targets, batch, 0)[0].backward()
    gradients = sum(p.grad.nbytes for p in model.net.parameters() if p.grad is not None)
    shape = replace(model.shape, prompt_tokens=prompt_tokens)
    planned = activation_bytes(shape, objective.passes.most, recomputed)
    assert 0.9 < (planned + gradients) / memory.peak < 1.3, "the plan may be larger: gradients come one by one"


def test_the_states_are_those_of_a_lora() -> None:
    model = load_model(device="cpu")
    add_lora(model.net, rank=8, alpha=8)
    trained = [p for p in model.net.parameters() if p.requires_grad]
    assert lora_parameters(model.shape, rank=8) == sum(p.numel() for p in trained)
    assert all(p.dtype == torch.float32 for p in trained)
    config = train_config({"lora_rank": 8})
    planned = plan_training(model.shape, Device("a CPU", 64e9, 1e11, 1e12), config)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = [*trained, *(p.grad for p in trained if p.grad is not None), *moments]
    assert planned.state_bytes == sum(tensor.nbytes for tensor in held)
