"""Objectives: what a step computes, and that a new one is one file and one line."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from training_runs import run_config

from vce_ray.cli.options import all_flags
from vce_ray.concepts.load import load_concept
from vce_ray.config import EMBEDDED, PROMPT_MODES, SamplingConfig
from vce_ray.defaults import default_settings
from vce_ray.models.adapter import remove_lora
from vce_ray.models.load import load_model
from vce_ray.run_config import RunConfig
from vce_ray.sampling import draw
from vce_ray.storage.store import Store
from vce_ray.training.data import Share, TrainingData
from vce_ray.training.objectives import OBJECTIVES, objective_for
from vce_ray.training.objectives.dpo import DPOConfig
from vce_ray.training.objectives.vsafe_dpo import VSafeDPOConfig
from vce_ray.training.terms.batches import AnchorBatch, PairBatch
from vce_ray.training.terms.divergence import Targets, anchor_targets, divergence_loss, keep_targets
from vce_ray.training.terms.preference import pair_log_probs
from vce_ray.training.trainable import in_own_dtype, make_trainable, recompute_layers, reference_context

TOY = '''
"""Supervised fine-tuning on the safe images: a toy."""

from typing import Literal

from pydantic import Field

from vce_ray.config import TrainConfig
from vce_ray.training.objectives.base import LOSS, Curve, Objective


class SFTConfig(TrainConfig):
    method: Literal["sft"] = "sft"
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing."""


class SFT(Objective):
    name = "sft"
    settings_type = SFTConfig
    curves = (LOSS, Curve("Likelihood", (("likelihood", "safe images"),)))

    def batch(self, data, step, share):
        return data.anchor_batch(step, share, self.settings.batch_size)

    def loss(self, model, targets, batch, step):
        import torch.nn.functional as F

        logits = model.image_logits(model.encode_prompts(batch.prompts), batch.tokens_BT)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.tokens_BT.flatten(), label_smoothing=self.settings.smoothing)
        return loss, {"loss": loss.item(), "likelihood": -loss.item()}
'''


def read(pair_set: Store) -> TrainingData:
    pairs, reference, keep = (pair_set.stage(name).read() for name in ("pairs", "reference", "keep"))
    return TrainingData.from_tables(pairs, reference, keep, PROMPT_MODES)


def with_train(settings: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"concept": "deer", "sampling": {}, "train": settings})


def test_a_new_objective_is_one_file_and_one_line(
    pair_set: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sft.py").write_text(TOY)
    spec = importlib.util.spec_from_file_location("sft", tmp_path / "sft.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(OBJECTIVES, "sft", module.SFT)

    settings = default_settings(load_concept("deer"), EMBEDDED, "sft")["train"] | {"smoothing": 0.0, "batch_size": 4}
    run = with_train(settings)
    assert run.recorded()["train"]["smoothing"] == 0.0 and run.train.prompt_modes == ()
    assert RunConfig.from_record(run.recorded()) == run
    (flag,) = [flag for flag in all_flags() if flag.option == "--smoothing"]
    assert flag.help == "Label smoothing. (sft only, default: 0.1)"
    with pytest.raises(ValidationError, match="beta"):
        with_train({"method": "sft", "beta": 1.0})

    model, objective, data = load_model(), objective_for(run.train), read(pair_set)
    make_trainable(model.net, run.train)
    trained = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    optimizer, targets = torch.optim.AdamW(trained, lr=2e-3), Targets(model, nullcontext)
    history = []
    for step in range(4):
        loss, metrics = objective.loss(model, targets, objective.batch(data, 0, Share(0, 1, 0)), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(metrics)
    assert history[-1]["loss"] < history[0]["loss"] - 0.05
    assert {metric for curve in objective.curves for metric, _ in curve.lines} <= history[0].keys()


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="unknown training method 'ppo': use one of vsafe_dpo, dpo"):
        with_train({"method": "ppo"})


def test_settings_of_another_method_are_refused() -> None:
    with pytest.raises(ValidationError, match="keep_weight"):
        with_train({"method": "dpo", "keep_weight": 3.0})


def test_no_preservation_must_be_asked_for() -> None:
    with pytest.raises(ValidationError, match="allow_no_preservation"):
        VSafeDPOConfig(keep_weight=0)
    assert not VSafeDPOConfig(keep_weight=0, allow_no_preservation=True).preserves


def test_vanilla_dpo_is_the_summed_preference_alone(pair_set: Store) -> None:
    objective, data, model = objective_for(DPOConfig(beta=0.05, batch_size=4)), read(pair_set), load_model()
    batch = objective.batch(data, 0, Share(0, 1, 0))
    with torch.no_grad():
        for parameter in model.language_model.layers.parameters():  # a policy that differs from the base
            parameter.mul_(1.02)
        loss, metrics = objective.loss(model, Targets(model, nullcontext), batch, 0)
        chosen, rejected = pair_log_probs(
            model, model.encode_prompts(batch.prompts), batch.chosen_BT, batch.rejected_BT
        )
    margin = (chosen - batch.chosen_ref_BT).sum(-1) - (rejected - batch.rejected_ref_BT).sum(-1)
    assert loss.item() == pytest.approx(-F.logsigmoid(0.05 * margin).mean().item(), rel=1e-4)
    assert metrics["margin"] == pytest.approx(margin.mean().item(), rel=1e-4) and not objective.needs_base
    assert not {"preservation", "anchor"} & metrics.keys()


def test_the_anchor_leaves_out_what_the_unsafe_prompt_makes_likelier() -> None:
    model = load_model()
    tokens = draw(model, ["a deer in the style of noto"], [1], SamplingConfig(guidance_scale=2.0, temperature=0.7))
    batch = AnchorBatch([0], ["a deer in the style of noto"], ["a deer"], tokens)
    plain, one, three = (
        anchor_targets(Targets(model, nullcontext), batch, guidance).exp() for guidance in (0.0, 1.0, 3.0)
    )
    unsafe = model.image_logits(model.encode_prompts(batch.prompts), tokens).softmax(-1)
    likelier, ones = unsafe > plain, torch.ones(1, 64)
    assert torch.allclose(plain.sum(-1), ones, atol=1e-4), "without guidance: the base under the refined caption"
    assert torch.equal(plain[unsafe < 0.99 * plain], three[unsafe < 0.99 * plain])
    assert (plain - one)[likelier].min() >= 0 and (one - three)[likelier].min() >= 0
    assert three[likelier].sum() + 1 < one[likelier].sum() < plain[likelier].sum() - 1


def test_recomputed_layers_and_adapters_in_bfloat16_change_no_gradient(pair_set: Store) -> None:
    """On a bfloat16 net, as Janus-Pro is trained on GPUs."""
    table = pair_set.stage("pairs").read().slice(0, 2).to_pylist()
    prompts = [row["prompt"] for row in table]
    chosen, rejected = (torch.tensor([row[side] for row in table]) for side in ("chosen", "rejected"))
    zeros = torch.zeros(chosen.shape)
    pairs = PairBatch(prompts, [False, False], torch.arange(2), chosen, rejected, zeros, zeros)
    objective = objective_for(VSafeDPOConfig(keep_weight=0, anchor_weight=0, allow_no_preservation=True))
    data: Any = type("Pairs", (), {"pair_batch": staticmethod(lambda *_: pairs)})
    batch = objective.batch(data, 0, Share(0, 1, 0))
    gradients = []
    for change in (lambda net: None, recompute_layers):
        model = load_model(dtype="bfloat16")
        torch.manual_seed(0)
        make_trainable(model.net, VSafeDPOConfig())
        for name, parameter in model.net.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        change(model.net)
        targets = Targets(model, reference_context(model, model))
        with in_own_dtype(model.net) if change is recompute_layers else nullcontext():
            loss, _ = objective.loss(model, targets, batch, 0)
            loss.backward()
        trained = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    remove_lora(model.net)
    assert model.net.state_dict().keys() == load_model(dtype="bfloat16").net.state_dict().keys()


def test_a_step_is_one_pass_and_the_sum_of_its_terms(pair_set: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under two of the three prompt modes the anchor has rows of its own; shared rows are computed once."""
    train = VSafeDPOConfig(batch_size=6, keep_batch_size=2, keep_weight=0.5, anchor_weight=2.0)
    objective, share = objective_for(train), Share(0, 1, 5)
    batch = objective.batch(read(pair_set), 6, share)
    pairs, keep, anchor = batch.pairs, batch.keep, batch.anchor
    own = [a == b and not blank for a, b, blank in zip(pairs.prompts, anchor.prompts, pairs.blank, strict=True)]
    assert sum(own) > 0 and sum(pairs.blank) > 0 and sum(own) + sum(pairs.blank) < 6, "a step of all three modes"
    model = load_model()
    passes: list[int] = []
    logits = model.image_logits

    def counted(prompts: Any, tokens: torch.Tensor) -> torch.Tensor:
        passes.append(len(tokens))
        return logits(prompts, tokens)

    with torch.no_grad():
        for parameter in model.language_model.layers.parameters():  # a policy that differs from the base
            parameter.mul_(1.02)
        targets = Targets(load_model(), torch.no_grad)
        monkeypatch.setattr(model, "image_logits", counted)
        loss, metrics = objective.loss(model, targets, batch, 6)
        assert passes == [6 * 2 + 2 + 6 - sum(own)]
        bare = objective_for(train.model_copy(update={"anchor_weight": 0.0, "keep_weight": 0.0}))
        plain, fewer = bare.loss(model, targets, type(batch)(pairs, None, None), 6)
        assert "anchor" not in fewer and plain.item() == pytest.approx(metrics["preference"], abs=1e-4)
        held = model.encode_prompts(keep.prompts).blanked(keep.blank)
        preservation = divergence_loss(logits(held, keep.tokens_BT), keep_targets(targets, keep)).mean().item()
        under = model.encode_prompts(anchor.prompts)
        divergence = divergence_loss(logits(under, anchor.tokens_BT), anchor_targets(targets, anchor)).mean().item()
    assert metrics["preservation"] == pytest.approx(preservation, rel=1e-3) and preservation > 1e-3
    assert metrics["anchor"] == pytest.approx(divergence, rel=1e-3) and divergence > 1e-3
    assert loss.item() == pytest.approx(metrics["preference"] + 0.5 * preservation + 2 * divergence, rel=1e-3)
    assert metrics["loss"] == loss.item()


def test_without_a_term_its_batch_is_not_drawn(pair_set: Store) -> None:
    train = run_config(keep_weight=0.0, allow_no_preservation=True, anchor_weight=0.0).train
    batch = objective_for(train).batch(read(pair_set), 0, Share(0, 1, 0))
    assert batch.keep is None and batch.anchor is None and not objective_for(train).needs_base
