"""Vanilla DPO (Rafailov et al., arXiv 2305.18290), the baseline: summed log-ratios of all tokens, no other term."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from vce_ray.config import PROMPT_MODES, TrainConfig
from vce_ray.training.objectives.base import GRADIENT_NORM, LOSS, PREFERENCE, Curve, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from vce_ray.models.base import ImageModel
    from vce_ray.training.data import Share, TrainingData
    from vce_ray.training.terms.batches import PairBatch
    from vce_ray.training.terms.divergence import Targets


class DPOConfig(TrainConfig):
    """Settings of vanilla DPO."""

    method: Literal["dpo"] = "dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    beta: float = Field(default=0.1, gt=0)
    """DPO beta: scale of the preference. Smaller than for a mean, because log-ratios are summed over tokens."""
    prompt_mode: Literal["given", "stripped", "null", "mixed"] = "given"
    """Prompt under which a pair is contrasted: as given, without the concept, none, or one of the three at random for
    each pair and step."""

    @property
    def prompt_modes(self) -> tuple[str, ...]:
        """Prompt modes that a step may draw."""
        return PROMPT_MODES if self.prompt_mode == "mixed" else (self.prompt_mode,)


class DPO(Objective):
    """Preference alone."""

    name: ClassVar[str] = "dpo"
    settings_type: ClassVar[type[TrainConfig]] = DPOConfig
    curves: ClassVar[tuple[Curve, ...]] = (LOSS, *PREFERENCE, GRADIENT_NORM)
    settings: DPOConfig

    def batch(self, data: TrainingData, step: int, share: Share) -> PairBatch:
        """Return the pairs of a step."""
        return data.pair_batch(step, share, self.settings.batch_size, self.settings.prompt_modes)

    def loss(self, model: ImageModel, targets: Targets, batch: PairBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the summed preference loss."""
        from vce_ray.training.terms.preference import pair_log_probs, preference_loss, token_drop_mask

        prompts = model.encode_prompts(batch.prompts).blanked(batch.blank)
        chosen, rejected = pair_log_probs(model, prompts, batch.chosen_BT, batch.rejected_BT)
        everything = token_drop_mask(batch.seeds, step, chosen.shape[1], drop=0.0)
        preference = preference_loss(
            chosen,
            rejected,
            batch.chosen_ref_BT,
            batch.rejected_ref_BT,
            everything,
            self.settings.beta,
            average=False,
        )
        loss = preference.loss.mean()
        metrics = preference.metrics() | {"chosen_logp": chosen.mean().item(), "rejected_logp": rejected.mean().item()}
        return loss, metrics | {"loss": loss.item()}
