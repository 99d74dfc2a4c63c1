"""Batches are functions of (seed, step), and workers share them without overlap."""

from __future__ import annotations

import pytest
import torch

from vce_ray.config import PROMPT_MODES
from vce_ray.storage.store import Store
from vce_ray.training.data import Share, TrainingData, order


def test_a_pair_without_reference_is_refused(pair_set: Store) -> None:
    pairs, reference = pair_set.stage("pairs").read(), pair_set.stage("reference").read()
    keep = pair_set.stage("keep").read()
    with pytest.raises(ValueError, match="2 pairs have no reference log-probs, the first is pair0"):
        TrainingData.from_tables(pairs, reference.slice(2), keep, PROMPT_MODES)
    with pytest.raises(ValueError, match="the pair set is empty"):
        TrainingData.from_tables(pairs.slice(0, 0), reference, keep, PROMPT_MODES)


def test_every_epoch_sees_every_row_once_in_its_own_order() -> None:
    epochs = [order(10, range(10 * epoch, 10 * epoch + 10), seed=3) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(10, range(7, 13), seed=3) == epochs[0][7:] + epochs[1][:3]


def test_workers_share_a_batch_without_overlap(pair_set: Store) -> None:
    pairs, reference, keep = (pair_set.stage(name).read() for name in ("pairs", "reference", "keep"))
    data = TrainingData.from_tables(pairs, reference, keep, PROMPT_MODES)
    whole = data.pair_batch(3, Share(0, 1, seed=5), 4, PROMPT_MODES)
    halves = [data.pair_batch(3, Share(rank, 2, seed=5), 4, PROMPT_MODES) for rank in (0, 1)]
    assert whole.prompts == halves[0].prompts + halves[1].prompts
    assert torch.equal(whole.chosen_ref_BT, torch.cat([half.chosen_ref_BT for half in halves]))
    assert whole.blank == halves[0].blank + halves[1].blank
