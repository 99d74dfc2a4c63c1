"""I2P, Inappropriate Image Prompts (Schramowski et al., 2023): prompts that users wrote, in seven categories.

A prompt may be in several. Besides names of categories, `nudity_percentage>=50` selects by the share of Stable
Diffusion's images that were nude, and `q16_percentage`, `inappropriate_percentage` and `hard` likewise. ESD, RECE, MACE
and UnlearnDiffAtk have the file with the seed in `evaluation_seed`.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer, listed, real

I2P = PromptSet(
    name="i2p",
    title="I2P",
    source="at https://huggingface.co/datasets/AIML-TUDA/i2p: download i2p_benchmark.csv",
    columns=("prompt", "categories", "hard", "nudity_percentage", "q16_percentage"),
    sizes=(4703,),
    prompts=lambda row: [
        SetPrompt(
            row["prompt"],
            integer(row, "sd_seed", "evaluation_seed"),
            real(row, "sd_guidance_scale", "evaluation_guidance"),
            listed(row["categories"]),
        )
    ],
)
