"""One training step on one worker's share of a batch: log-probs, loss and figures. Knows no Ray and no files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vce_ray.config import TrainConfig
from vce_ray.models.base import ImageModel, PromptBatch
from vce_ray.training.loss import keep_mask, preference_loss, preservation_loss, token_log_probs

TARGET_BYTES = 256 * 2**20
"""What the kept targets of a worker may take: all of the embedded model's, a dozen of Janus-Pro-7B's."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one step. `blank` rows are contrasted without any prompt (the null mode)."""

    prompts: list[str]
    blank: list[bool]
    seeds: Tensor
    """int64 [B]: what the token drop of a pair derives from."""
    chosen_BT: Tensor
    rejected_BT: Tensor
    chosen_ref_BT: Tensor
    """Log-probs of the reference under the same prompt, float32."""
    rejected_ref_BT: Tensor


@dataclass(frozen=True)
class KeepBatch:
    """Images that the model is held to the base on."""

    rows: list[int]
    """Which images of the keep set they are."""
    prompts: list[str]
    blank: list[bool]
    tokens_BT: Tensor


@dataclass(frozen=True)
class AnchorBatch:
    """Safe images, with the unsafe prompts that shall lead to them and the refined captions that did."""

    rows: list[int]
    """Which pairs of the pair set they are."""
    prompts: list[str]
    refined: list[str]
    tokens_BT: Tensor


def pair_log_probs(model: ImageModel, prompts: PromptBatch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides, each float32 [B, T], in one forward pass of 2B rows."""
    both = prompts.rows(torch.arange(len(prompts), device=chosen.device).repeat(2))
    tokens = torch.cat([chosen, rejected])
    log_probs = token_log_probs(model.image_logits(both, tokens), tokens)
    chosen_BT, rejected_BT = log_probs.chunk(2)
    return chosen_BT, rejected_BT


AsReference = Callable[[], AbstractContextManager[None]]
"""A context in which the reference computes as the base does (its adapter is off)."""


class Targets:
    """What the reference says of images that come again each epoch: computed once, and kept while there is room."""

    def __init__(self, model: ImageModel, as_reference: AsReference, sharded: bool = False):
        """
        Args:
            model: the reference; it may be the trained model itself.
            sharded: its weights are gathered from all workers, so each of them must call it as often as the others.
        """
        self.model, self.as_reference, self.sharded = model, as_reference, sharded
        self.room = TARGET_BYTES
        self.kept: dict[Hashable, Tensor] = {}

    def __call__(self, keys: Sequence[Hashable], compute: Callable[[ImageModel, Tensor], Tensor]) -> Tensor:
        """Targets [B, T, V] of images with these keys; `compute(model, rows)` makes those of some rows of the batch."""
        found = {key: self.kept[key] for key in keys if key in self.kept}
        missing = [i for i, key in enumerate(keys) if key not in found]
        if asked := missing or [0] * self.sharded:
            with torch.no_grad(), self.as_reference():
                made = compute(self.model, torch.tensor(asked, device=self.model.device))
            for i, target in zip(asked, made):
                found[keys[i]] = target
                size = target.numel() * target.element_size()
                if keys[i] not in self.kept and size <= self.room:
                    self.kept[keys[i]] = target.clone()
                    self.room -= size
            if len(asked) == len(keys):
                return made
        return torch.stack([found[key] for key in keys])


def step_loss(
    model: ImageModel,
    targets: Targets,
    pairs: PairBatch,
    keep: KeepBatch | None,
    safe: AnchorBatch | None,
    step: int,
    config: TrainConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The loss averaged over this worker's images, and the figures that are logged.

    All images go through the model in one forward pass. A safe image whose pair is contrasted under its whole prompt
    is what the anchor asks for too, and goes through it once.

    Args:
        keep: images of the preservation term; None leaves it out.
        safe: the same pairs, in the same order, for the anchor; None leaves it out.
    """
    count = len(pairs.prompts)
    texts, blank = list(pairs.prompts), list(pairs.blank)
    places, tokens = [*range(count), *range(count)], [pairs.chosen_BT, pairs.rejected_BT]
    if keep is not None:
        places += range(count, count + len(keep.prompts))
        texts, blank = texts + keep.prompts, blank + keep.blank
        tokens.append(keep.tokens_BT)
    anchored = list(range(count))  # the row of each safe image under its unsafe prompt
    if safe is not None:
        own = [i for i in range(count) if pairs.blank[i] or pairs.prompts[i] != safe.prompts[i]]
        for i in own:
            anchored[i] = len(places)
            places.append(len(texts))
            texts.append(safe.prompts[i])
            blank.append(False)
        tokens.append(safe.tokens_BT[own])
    tokens_RT = torch.cat(tokens)
    prompts = model.encode_prompts(texts).blanked(blank).rows(torch.tensor(places, device=tokens_RT.device))
    logits = model.image_logits(prompts, tokens_RT)

    chosen, rejected = token_log_probs(logits[: 2 * count], tokens_RT[: 2 * count]).chunk(2)
    loss, figures = _pair_loss(chosen, rejected, pairs, step, config)
    if keep is not None:
        kept = logits[2 * count : 2 * count + len(keep.prompts)]
        preservation = preservation_loss(kept, keep_target(targets, keep)).mean()
        figures["preservation"] = preservation.item()
        loss = loss + config.keep_weight * preservation
    if safe is not None:
        anchor = preservation_loss(logits[anchored], anchor_target(targets, safe, config.anchor_guidance)).mean()
        figures["anchor"] = anchor.item()
        loss = loss + config.anchor_weight * anchor
    return loss, figures | {"loss": loss.item()}


def _pair_loss(
    chosen: Tensor, rejected: Tensor, batch: PairBatch, step: int, config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    """The preference loss, from log-probs [B, T] of both sides, and its figures."""
    vsafe = config.method == "vsafe_dpo"
    drop = config.token_drop if vsafe else 0.0
    mask = keep_mask(batch.seeds, step, chosen.shape[1], drop)
    result = preference_loss(
        chosen, rejected, batch.chosen_ref_BT, batch.rejected_ref_BT, mask, config.beta, average=vsafe
    )
    figures = {
        "preference": result.loss.mean().item(),
        "margin": result.margin.mean().item(),
        "accuracy": (result.margin > 0).float().mean().item(),
        "chosen_ratio": result.chosen_ratio.mean().item(),
        "rejected_ratio": result.rejected_ratio.mean().item(),
        "chosen_logp": chosen.mean().item(),
        "rejected_logp": rejected.mean().item(),
    }
    return result.loss.mean(), figures


def keep_target(targets: Targets, batch: KeepBatch) -> Tensor:
    """What the base says of the images that the model is held to: logits [B, T, V]."""

    def compute(reference: ImageModel, rows: Tensor) -> Tensor:
        asked = rows.tolist()
        prompts = reference.encode_prompts([batch.prompts[i] for i in asked]).blanked([batch.blank[i] for i in asked])
        return reference.image_logits(prompts, batch.tokens_BT[rows])

    return targets([("keep", *key) for key in zip(batch.rows, batch.blank)], compute)


def anchor_target(targets: Targets, batch: AnchorBatch, guidance: float = 1.0) -> Tensor:
    """What shall be drawn instead under the unsafe prompt: log-probs [B, T, V] of the safe images' tokens.

    The target of each token is the base under the refined caption, less what the unsafe prompt makes likelier:
    'an animal' is a deer now and then, and a picture without a style named is in the erased one as often as in others.
    Its log-probs, but for a constant, are log p(refined) + guidance * min(0, log p(refined) - log p(unsafe)): steps of
    the negative guidance of ESD (arXiv 2303.07345), taken only where they lower a token.
    """

    def compute(reference: ImageModel, rows: Tensor) -> Tensor:
        unsafe, refined = (
            reference.encode_prompts([texts[i] for i in rows.tolist()]) for texts in (batch.prompts, batch.refined)
        )
        wanted = reference.image_logits(refined, batch.tokens_BT[rows]).log_softmax(-1)
        unwanted = reference.image_logits(unsafe, batch.tokens_BT[rows]).log_softmax(-1)
        return wanted + guidance * (wanted - unwanted).clamp(max=0)

    return targets([("anchor", row) for row in batch.rows], compute)
