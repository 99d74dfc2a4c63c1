"""VSafe-DPO, the method of VCE (arXiv 2509.16986): token-averaged DPO with token drop, preservation and an anchor.

The preference is stated in training/terms/preference.py, preservation and anchor in training/terms/divergence.py. The
paper's equations were not available; the form is our reconstruction, and the anchor is our addition (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vce_ray.config import PROMPT_MODES, TrainConfig
from vce_ray.errors import UserError
from vce_ray.training.objectives.base import GRADIENT_NORM, LOSS, PREFERENCE, Curve, Objective, Passes

if TYPE_CHECKING:
    from torch import Tensor

    from vce_ray.models.base import ImageModel
    from vce_ray.training.data import Share, TrainingData
    from vce_ray.training.terms.batches import AnchorBatch, KeepBatch, PairBatch
    from vce_ray.training.terms.divergence import Targets

STYLE_SETTINGS: dict[str, Any] = {
    "beta": 2.0,
    "keep_weight": 4.0,
    "anchor_weight": 2.0,
    "anchor_guidance": 5.0,
    "prompt_mode": "given",
    "batch_size": 12,
    "keep_batch_size": 8,
    "learning_rate": 2e-3,
}
"""Settings for styles. A few bold steps remove a style and cost less of what other styles share with it than many
small ones. A large beta saturates at a small margin, so training does not keep pushing the style's tokens
down; the anchor does the rest, because the base draws every style for a caption that names none. The prompt is always
given: without it an unsafe image is hard to tell from images of other styles. Trials: docs/results/style_trials.md."""


class VSafeDPOConfig(TrainConfig):
    """Settings of VSafe-DPO."""

    method: Literal["vsafe_dpo"] = "vsafe_dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    beta: float = Field(default=1.0, gt=0)
    """DPO beta: scale of the preference, on the mean over tokens."""
    token_drop: float = Field(default=0.25, ge=0.0, lt=1.0)
    """Share of token positions that each step leaves out of the preference."""
    keep_weight: float = Field(default=2.0, ge=0.0)
    """Weight of the preservation term: KL of each token to the base on kept prompts."""
    anchor_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the anchor: KL of each token of the safe image, under the unsafe prompt, to the base under the refined
    caption. The preference says what not to draw; the anchor says what to draw instead. 0 disables it."""
    anchor_guidance: float = Field(default=1.0, ge=0.0, le=10.0)
    """Strength of the negative guidance that removes the concept from the anchor's target."""
    allow_no_preservation: bool = False
    """Permit training without preservation, which takes other content with the concept."""
    prompt_mode: Literal["given", "stripped", "null", "mixed"] = "mixed"
    """Prompt under which a pair is contrasted: as given, without the concept, none, or one of the three at random for
    each pair and step."""
    keep_batch_size: int = Field(default=16, ge=0)
    """Preservation images per step, over all workers."""

    @model_validator(mode="after")
    def _check_preservation(self) -> Self:
        if not self.preserves and not self.allow_no_preservation:
            raise UserError(
                "keep_weight or keep_batch_size is 0: without preservation the erasure takes other content with it; "
                "set allow_no_preservation to train all the same"
            )
        return self

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """Names of the batch sizes that are split evenly over the workers."""
        return ("batch_size", "keep_batch_size")

    @property
    def prompt_modes(self) -> tuple[str, ...]:
        """Prompt modes that a step may draw."""
        return PROMPT_MODES if self.prompt_mode == "mixed" else (self.prompt_mode,)

    @property
    def preserves(self) -> bool:
        """Whether the loss has a preservation term."""
        return self.keep_weight > 0 and self.keep_batch_size > 0

    @property
    def anchors(self) -> bool:
        """Whether the loss has an anchor."""
        return self.anchor_weight > 0


@dataclass(frozen=True)
class VSafeDPOBatch:
    """One worker's share of a step."""

    pairs: PairBatch
    keep: KeepBatch | None
    """None without preservation."""
    anchor: AnchorBatch | None
    """The same pairs in the same order; None without an anchor."""

    def to(self, device: Any) -> VSafeDPOBatch:
        """Return the same batch with its tensors on `device`."""
        return VSafeDPOBatch(
            self.pairs.to(device), self.keep and self.keep.to(device), self.anchor and self.anchor.to(device)
        )


class VSafeDPO(Objective):
    """Preference with preservation and anchor, all in one forward pass."""

    name: ClassVar[str] = "vsafe_dpo"
    settings_type: ClassVar[type[TrainConfig]] = VSafeDPOConfig
    curves: ClassVar[tuple[Curve, ...]] = (
        LOSS,
        *PREFERENCE,
        Curve(
            "Preservation",
            (("preservation", "KL per token on kept prompts"),),
            "How far the model has moved from the base model where it must stay. It stays near 0.",
        ),
        Curve(
            "Anchor",
            (("anchor", "KL per token on safe images"),),
            "How far an unsafe prompt is from giving what the base model draws instead. It falls.",
        ),
        GRADIENT_NORM,
    )
    settings: VSafeDPOConfig

    @classmethod
    def defaults(cls, kind: str) -> dict[str, Any]:
        """Return the settings for styles; other kinds use the usual defaults."""
        return STYLE_SETTINGS if kind == "style" else {}

    @property
    def needs_base(self) -> bool:
        """Whether a divergence term asks the base for targets."""
        return self.settings.preserves or self.settings.anchors

    @property
    def passes(self) -> Passes:
        """Images that a step runs through the model.

        A pair is two images, and a third one if it has an anchor and is not contrasted under its whole prompt. The
        targets of an anchor take the base two passes, those of a kept image one.
        """
        settings = self.settings
        pairs, kept = settings.batch_size, settings.keep_batch_size if settings.preserves else 0
        anchors, modes = pairs if settings.anchors else 0, settings.prompt_modes
        others = sum(mode != "given" for mode in modes)
        images = 2 * pairs + kept
        return Passes(
            trained=images + anchors * others / len(modes),
            most=images + (anchors if others else 0),
            base=kept + 2 * anchors,
        )

    def batch(self, data: TrainingData, step: int, share: Share) -> VSafeDPOBatch:
        """Return pairs, preservation images and anchors of a step."""
        settings = self.settings
        return VSafeDPOBatch(
            data.pair_batch(step, share, settings.batch_size, settings.prompt_modes),
            data.keep_batch(step, share, settings.keep_batch_size) if settings.preserves else None,
            data.anchor_batch(step, share, settings.batch_size) if settings.anchors else None,
        )

    def loss(
        self, model: ImageModel, targets: Targets, batch: VSafeDPOBatch, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Return preference + keep_weight * preservation + anchor_weight * anchor.

        All images share one forward pass. A safe image that is contrasted under its whole prompt is also what the
        anchor asks for, so it goes through the model once.
        """
        import torch

        from vce_ray.training.terms.divergence import anchor_targets, divergence_loss, keep_targets
        from vce_ray.training.terms.preference import preference_loss, token_drop_mask, token_log_probs

        pairs, keep, anchor, settings = batch.pairs, batch.keep, batch.anchor, self.settings
        count = len(pairs.prompts)
        # `texts` are encoded once each; `places` maps every row of the forward pass to its text
        texts, blank = list(pairs.prompts), list(pairs.blank)
        places, tokens = [*range(count), *range(count)], [pairs.chosen_BT, pairs.rejected_BT]
        if keep is not None:
            places += range(count, count + len(keep.prompts))
            texts, blank = texts + keep.prompts, blank + keep.blank
            tokens.append(keep.tokens_BT)
        anchor_rows = list(range(count))  # the row of each safe image under its unsafe prompt
        if anchor is not None:
            extra = [i for i in range(count) if pairs.blank[i] or pairs.prompts[i] != anchor.prompts[i]]
            for i in extra:
                anchor_rows[i] = len(places)
                places.append(len(texts))
                texts.append(anchor.prompts[i])
                blank.append(False)
            tokens.append(anchor.tokens_BT[extra])
        tokens_RT = torch.cat(tokens)
        prompts = model.encode_prompts(texts).blanked(blank).rows(torch.tensor(places, device=tokens_RT.device))
        logits = model.image_logits(prompts, tokens_RT)

        chosen, rejected = token_log_probs(logits[: 2 * count], tokens_RT[: 2 * count]).chunk(2)
        mask = token_drop_mask(pairs.seeds, step, chosen.shape[1], settings.token_drop)
        preference = preference_loss(chosen, rejected, pairs.chosen_ref_BT, pairs.rejected_ref_BT, mask, settings.beta)
        loss, metrics = preference.loss.mean(), preference.metrics()
        metrics |= {"chosen_logp": chosen.mean().item(), "rejected_logp": rejected.mean().item()}
        if keep is not None:
            kept = logits[2 * count : 2 * count + len(keep.prompts)]
            preservation = divergence_loss(kept, keep_targets(targets, keep)).mean()
            metrics["preservation"] = preservation.item()
            loss = loss + settings.keep_weight * preservation
        if anchor is not None:
            target = anchor_targets(targets, anchor, settings.anchor_guidance)
            divergence = divergence_loss(logits[anchor_rows], target).mean()
            metrics["anchor"] = divergence.item()
            loss = loss + settings.anchor_weight * divergence
        return loss, metrics | {"loss": loss.item()}
