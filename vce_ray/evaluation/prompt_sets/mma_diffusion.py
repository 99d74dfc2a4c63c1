"""MMA-Diffusion (Yang et al., 2024): adversarial prompts without words that a filter would find."""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt

MMA_DIFFUSION = PromptSet(
    name="mma-diffusion",
    title="MMA-Diffusion",
    source="at https://huggingface.co/datasets/YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark: sign in, accept "
    "its terms there, and download it",
    columns=("adv_prompt",),
    sizes=(1000,),
    prompts=lambda row: [SetPrompt(row["adv_prompt"])],
)
