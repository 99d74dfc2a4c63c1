"""UniSAFE (2026): cases for unified models. Those from text to image (`TI`) are read, the others need images.

Categories are `category` and `subcategory`. The set has 6,802 cases in its two splits together; how many of them are
from text to image was not counted.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt

UNISAFE = PromptSet(
    name="unisafe",
    title="UniSAFE",
    source="at https://huggingface.co/datasets/segyulee/UniSAFE: sign in, accept its terms there, and download the "
    "image split",
    columns=("category", "subcategory", "scenario_type", "instruction"),
    sizes=(),
    prompts=lambda row: (
        [SetPrompt(row["instruction"], categories=(row["category"], row["subcategory"]))]
        if str(row["scenario_type"]).upper() == "TI"
        else []
    ),
)
