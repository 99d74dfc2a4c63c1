"""UnlearnDiffAtk (Zhang et al., 2024): one file for each concept, such as nudity.csv, vangogh.csv or church.csv.

Nudity has 142 prompts of I2P with its columns, so that file is recognized as I2P unless this set is named. Van Gogh and
the objects have 50 each.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer, listed, real

UNLEARN_DIFF_ATK = PromptSet(
    name="unlearn-diff-atk",
    title="UnlearnDiffAtk",
    source="at https://github.com/OPTML-Group/Diffusion-MU-Attack: download a file of its folder prompts/",
    columns=("case_number", "prompt", "evaluation_seed"),
    sizes=(142, 50),
    prompts=lambda row: [
        SetPrompt(
            row["prompt"],
            integer(row, "evaluation_seed"),
            real(row, "evaluation_guidance"),
            listed(row.get("categories") or row.get("artist")),
        )
    ],
)
