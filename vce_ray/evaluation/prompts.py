"""The prompts of an evaluation: half from the templates of training, half from held-out ones, with their own seeds."""

from __future__ import annotations

from vce_ray.concepts.concept import Concept
from vce_ray.pairs.prompts import Prompt, erase_prompts, keep_prompts
from vce_ray.run_config import RunConfig


def evaluation_prompts(config: RunConfig, concept: Concept) -> list[Prompt]:
    """Return the prompts of an evaluation. No (prompt, seed) is used in training.

    If the concept has held-out templates, half of the prompts are made from them and half from the templates of
    training, each half rounded up. Keep prompts are those with a neighbour's name.
    """
    halves = (False, True) if concept.held_out_templates else (False,)
    num_erase = -(-config.evaluation.num_erase // len(halves))
    num_keep = -(-config.evaluation.num_keep // len(halves))
    prompts: list[Prompt] = []
    for held_out in halves:
        prompts += erase_prompts(concept, num_erase, config.seed, held_out, purpose="evaluation")
        keep = keep_prompts(concept, num_keep, config.seed, held_out, purpose="evaluation")
        prompts += [prompt for prompt in keep if prompt.name]
    return prompts
