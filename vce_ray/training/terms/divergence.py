"""Divergence from the frozen base: preservation on kept images, and the anchor on safe ones.

Both are KL(target || policy) of each next-token distribution. They differ in what the base is asked for its target.

Shapes: B images, T image tokens, V image vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from vce_ray.models.base import ImageModel
from vce_ray.training.terms.batches import AnchorBatch, KeepBatch

CACHE_BYTES = 256 * 2**20
"""Memory of a worker's target cache: holds all targets of the embedded model, about a dozen of Janus-Pro-7B's."""

AsReference = Callable[[], AbstractContextManager[None]]
"""Returns a context in which the model computes as the base does, with its adapter off."""


def divergence_loss(logits_BTV: Tensor, target_BTV: Tensor) -> Tensor:
    """KL(target || policy) of each next-token distribution, averaged over the tokens of an image: float32 [B]."""
    policy = F.log_softmax(logits_BTV.float(), dim=-1)
    target = F.log_softmax(target_BTV.float(), dim=-1)
    return F.kl_div(policy, target, reduction="none", log_target=True).sum(-1).mean(-1)


class Targets:
    """Targets that the base computes for images, cached because the same images return every epoch.

    Args:
        model: the reference model; it may be the trained model itself.
        as_reference: context in which `model` computes as the base.
        sharded: the weights are gathered from all workers, so every worker must run the model equally often.
        cache_bytes: memory that cached targets may take.
    """

    def __init__(
        self, model: ImageModel, as_reference: AsReference, sharded: bool = False, cache_bytes: int = CACHE_BYTES
    ):
        self.model, self.as_reference, self.sharded = model, as_reference, sharded
        self.room = cache_bytes
        self.cache: dict[Hashable, Tensor] = {}

    def __call__(self, keys: Sequence[Hashable], compute: Callable[[ImageModel, Tensor], Tensor]) -> Tensor:
        """Return targets [B, T, V] of the images with these keys.

        Args:
            compute: called as `compute(model, rows)` for the rows of the batch that are not cached.
        """
        found = {key: self.cache[key] for key in keys if key in self.cache}
        missing = [i for i, key in enumerate(keys) if key not in found]
        # A sharded model gathers its weights from all workers in the forward pass: a worker with nothing to compute
        # runs one row all the same, or the others would wait for it forever.
        if rows := missing or [0] * self.sharded:
            with torch.no_grad(), self.as_reference():
                computed = compute(self.model, torch.tensor(rows, device=self.model.device))
            for i, target in zip(rows, computed):
                found[keys[i]] = target
                size = target.numel() * target.element_size()
                if keys[i] not in self.cache and size <= self.room:
                    self.cache[keys[i]] = target.clone()  # a view would keep the whole batch in memory
                    self.room -= size
            if len(rows) == len(keys):
                return computed
        return torch.stack([found[key] for key in keys])


def keep_targets(targets: Targets, batch: KeepBatch) -> Tensor:
    """Return the base's logits [B, T, V] on preservation images."""

    def compute(reference: ImageModel, rows: Tensor) -> Tensor:
        places = rows.tolist()
        texts, blank = [batch.prompts[i] for i in places], [batch.blank[i] for i in places]
        return reference.image_logits(reference.encode_prompts(texts).blanked(blank), batch.tokens_BT[rows])

    return targets([("keep", *key) for key in zip(batch.rows, batch.blank)], compute)


def anchor_targets(targets: Targets, batch: AnchorBatch, guidance: float = 1.0) -> Tensor:
    """Return what the model should draw under the unsafe prompt: unnormalized log-probs [B, T, V] on safe images.

    The target is the base under the refined caption, minus whatever the unsafe prompt makes likelier: 'an animal' is a
    deer now and then, and an image whose prompt names no style has the erased style as often as any other. Up to a
    constant, its log-probs are log p(refined) + guidance * min(0, log p(refined) - log p(unsafe)): the negative
    guidance of ESD (arXiv 2303.07345), applied only where it lowers a token.
    """

    def compute(reference: ImageModel, rows: Tensor) -> Tensor:
        unsafe, refined = (
            reference.encode_prompts([texts[i] for i in rows.tolist()]) for texts in (batch.prompts, batch.refined)
        )
        wanted = reference.image_logits(refined, batch.tokens_BT[rows]).log_softmax(-1)
        unwanted = reference.image_logits(unsafe, batch.tokens_BT[rows]).log_softmax(-1)
        return wanted + guidance * (wanted - unwanted).clamp(max=0)

    return targets([("anchor", row) for row in batch.rows], compute)
