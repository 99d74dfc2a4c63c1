"""MACE (Lu et al., 2024): artists (5,000 rows) and celebrities, each prompt with several seeds.

The column `type` says whether a name is erased or kept: 'erased' or 'others' for celebrities, 0 or 1 for artists. It is
a category, and so is the artist. Of the files with 5, 10 and 100 celebrities the sizes were not counted. The CIFAR-10
prompts of MACE are no file: they are 'a photo of the {class}'.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer

MACE = PromptSet(
    name="mace",
    title="MACE",
    source="at https://github.com/Shilin-LU/MACE: download a file of its folder prompts_csv/",
    columns=("type", "prompt", "evaluation_seed"),
    sizes=(),
    prompts=lambda row: [
        SetPrompt(
            row["prompt"],
            integer(row, "evaluation_seed"),
            categories=tuple(str(row[column]) for column in ("type", "artist") if row.get(column) not in (None, "")),
        )
    ],
)
