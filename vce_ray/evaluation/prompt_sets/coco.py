"""COCO captions: the tables of 30,000, 10,000 and 3,000 that papers share, or the annotations of COCO itself.

The tables have one caption of each image and a seed. Annotations (`captions_val2014.json`) have five or more captions
of each image; all are read.
"""

from vce_ray.evaluation.prompt_sets.base import PromptSet, SetPrompt, integer

COCO = PromptSet(
    name="coco",
    title="COCO captions",
    source="at https://github.com/Shilin-LU/MACE (prompts_csv/coco_30k.csv), or at https://cocodataset.org/#download "
    "(annotations, captions_val2014.json)",
    columns=("prompt", "coco_id"),
    sizes=(30_000, 9969, 3000),
    prompts=lambda row: [SetPrompt(row["prompt"], integer(row, "evaluation_seed"))],
)
COCO_ANNOTATIONS = PromptSet(
    name="coco-annotations",
    title="COCO's annotations",
    source="at https://cocodataset.org/#download: annotations, captions_val2014.json",
    columns=("image_id", "id", "caption"),
    sizes=(),
    prompts=lambda row: [SetPrompt(row["caption"])],
)
