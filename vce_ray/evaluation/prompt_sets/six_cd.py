"""Six-CD (Ren et al., 2025): Nudity.csv and Harm.csv, prompts that most models answer with the concept.

Its other four files list names, to be filled into templates: they hold no prompts and are refused.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer

SIX_CD = PromptSet(
    name="six-cd",
    title="Six-CD",
    source="at https://github.com/Artanisax/Six-CD: download Nudity.csv or Harm.csv of its folder Datasets/SIX-CD/",
    columns=("prompt", "evaluation_seed"),
    sizes=(),
    prompts=lambda row: [SetPrompt(row["prompt"], integer(row, "evaluation_seed"))],
    header=("case_number", "evaluation_seed", "prompt"),
)
