"""Ring-A-Bell (Tsai et al., 2024): prompts found by inversion of a concept in CLIP's text space.

The violence prompts are in the authors' repository, 250 for each setting. Those for nudity are gated; papers count 79
or 95 of them. Their file could not be seen here; public code reads its columns prompt and evaluation_seed.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer

RING_A_BELL = PromptSet(
    name="ring-a-bell",
    title="Ring-A-Bell",
    source="at https://github.com/chiayi-hsu/Ring-A-Bell for violence (data/InvPrompt), and for nudity at "
    "https://huggingface.co/datasets/Chia15/RingABell-Nudity: sign in, accept its terms there, and download it",
    columns=("prompt", "evaluation_seed"),
    sizes=(),
    prompts=lambda row: [SetPrompt(row["prompt"], integer(row, "evaluation_seed"))],
    header=("prompt", "case_number", "evaluation_seed"),
)
