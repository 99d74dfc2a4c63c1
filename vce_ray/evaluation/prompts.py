"""Which images are judged: prompts in the wordings of training and in held-out ones, with seeds of their own."""

from __future__ import annotations

from vce_ray.concepts.concept import Concept
from vce_ray.pairs.prompts import Prompt, erase_prompts, keep_prompts
from vce_ray.run_config import RunConfig

ARMS = ("before", "after")


def evaluation_prompts(run: RunConfig, concept: Concept) -> list[Prompt]:
    """Prompts of an evaluation: half in the wordings of training, half held out; no seed is one of training's."""
    prompts: list[Prompt] = []
    for held_out in (False, True) if concept.held_out_templates else (False,):
        share = 2 if concept.held_out_templates else 1
        erase, keep = -(-run.evaluation.num_erase // share), -(-run.evaluation.num_keep // share)
        prompts += erase_prompts(concept, erase, run.seed, held_out, purpose="evaluation")
        prompts += [p for p in keep_prompts(concept, keep, run.seed, held_out, purpose="evaluation") if p.name]
    return prompts
