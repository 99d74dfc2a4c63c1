"""ECGVF (EAR, 2025): pairs of prompts with and without a concept, made by language models.

The whole benchmark could not be seen here. The layout is that of the training files in EAR's repository: JSON objects
with original_prompt, modified_prompt, concept and replaced. The original prompts are read.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, listed

ECGVF = PromptSet(
    name="ecgvf",
    title="ECGVF",
    source="at https://github.com/immc-lab/ear: files of its folder data/",
    columns=("original_prompt", "modified_prompt", "concept"),
    sizes=(),
    prompts=lambda row: [SetPrompt(row["original_prompt"], categories=listed(row["concept"]))],
)
