"""Loss terms on exact small tensors."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from vce_ray.evaluation.collapse import collapsed
from vce_ray.training.terms.divergence import Targets, divergence_loss
from vce_ray.training.terms.preference import preference_loss, token_drop_mask, token_log_probs

# one pair of three tokens: the policy moved the chosen side by +.1 .2 .3 and the rejected side by -.4 -.5 -.6
CHOSEN_REF = torch.tensor([[-1.0, -2.0, -3.0]])
REJECTED_REF = torch.tensor([[-3.0, -2.0, -1.0]])
CHOSEN = CHOSEN_REF + torch.tensor([[0.1, 0.2, 0.3]])
REJECTED = REJECTED_REF - torch.tensor([[0.4, 0.5, 0.6]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_mean_over_all_tokens():
    result = preference_loss(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF, ALL, beta=2.0)
    assert result.chosen_ratio.item() == pytest.approx(0.2)
    assert result.rejected_ratio.item() == pytest.approx(-0.5)
    assert result.margin.item() == pytest.approx(0.7)
    assert result.loss.item() == pytest.approx(softplus(-1.4))


def test_vanilla_dpo_sums():
    result = preference_loss(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF, ALL, beta=2.0, average=False)
    assert result.margin.item() == pytest.approx(2.1)
    assert result.loss.item() == pytest.approx(softplus(-4.2))


def test_dropped_tokens_do_not_count_and_get_no_gradient():
    chosen = CHOSEN.clone().requires_grad_()
    mask = torch.tensor([[True, False, True]])
    result = preference_loss(chosen, REJECTED, CHOSEN_REF, REJECTED_REF, mask, beta=1.0)
    assert result.chosen_ratio.item() == pytest.approx((0.1 + 0.3) / 2)
    assert result.rejected_ratio.item() == pytest.approx((-0.4 - 0.6) / 2)
    result.loss.sum().backward()
    slope = -(1 - 1 / (1 + math.exp(-0.7))) / 2  # d -log sigmoid(m) / dm = sigmoid(m) - 1, shared by two tokens
    assert chosen.grad is not None
    assert chosen.grad.tolist()[0] == pytest.approx([slope, 0.0, slope])


def test_an_untrained_model_stands_at_log_two():
    result = preference_loss(CHOSEN_REF, REJECTED_REF, CHOSEN_REF, REJECTED_REF, ALL, beta=5.0)
    assert result.loss.item() == pytest.approx(math.log(2))


def test_token_log_probs_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    tokens = torch.tensor([[0, 2]])
    assert token_log_probs(logits + 7, tokens).exp().tolist()[0] == pytest.approx([0.5, 0.8])


def test_preservation_is_the_kl_of_each_token():
    reference = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    policy = torch.log(torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]))
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence_loss(policy, reference).item() == pytest.approx(kl / 2)
    assert divergence_loss(reference, reference).item() == pytest.approx(0.0, abs=1e-7)


def test_token_drop_belongs_to_pair_and_step_not_to_the_batch():
    seeds = torch.arange(2000)
    mask = token_drop_mask(seeds, 7, 64, drop=0.25)
    assert mask.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(mask[5:9], token_drop_mask(seeds[5:9], 7, 64, drop=0.25))
    assert not torch.equal(mask, token_drop_mask(seeds, 8, 64, drop=0.25))
    assert token_drop_mask(seeds, 0, 64, drop=0.0).all()
    assert token_drop_mask(seeds, 0, 2, drop=0.9).any(-1).all()  # never is a pair left without a token


def test_collapse_is_told_from_erasure():
    margins = [0.1 * i for i in range(50)]
    fall = [-0.1 * i for i in range(50)]
    assert collapsed(margins, chosen=fall, rejected=[2 * x for x in fall])
    assert not collapsed(margins, chosen=[0.0] * 50, rejected=fall)
    assert not collapsed([0.0] * 50, chosen=[0.0] * 50, rejected=[0.0] * 50)


class Counted:
    """Stands in for a reference model and counts the rows that it computes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def target(self, values: list[float], rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(rows.tolist())
        return torch.tensor(values)[rows, None, None].expand(-1, 2, 3)


def test_targets_are_computed_once_for_each_image() -> None:
    def ask(targets: Targets, *keys: str) -> list[float]:
        values = [float(ord(key)) for key in keys]
        return targets(keys, lambda reference, rows: model.target(values, rows))[:, 0, 0].tolist()

    model: Any = Counted()
    targets = Targets(model, nullcontext)
    assert ask(targets, "a", "b") == [97, 98] and ask(targets, "b", "c", "b") == [98, 99, 98]
    assert ask(targets, "c", "a") == [99, 97] and model.asked == [[0, 1], [1]]
    model.asked.clear()
    sharded = Targets(model, nullcontext, sharded=True)
    for _ in range(2):
        assert ask(sharded, "a", "b") == [97, 98]
    assert model.asked == [[0, 1], [0]]  # the other workers wait for its forward pass
    model.asked.clear()
    small = Targets(model, nullcontext, cache_bytes=30)  # room for one of 24 bytes
    for _ in range(2):
        assert ask(small, "a", "b") == [97, 98]
    assert model.asked == [[0, 1], [1]]
