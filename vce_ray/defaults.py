"""What a run is set to where its user does not say: by the kind of its concept, and by its method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vce_ray.concepts.concept import load_concept
from vce_ray.config import TrainConfig
from vce_ray.models.load import EMBEDDED
from vce_ray.pipeline.run import catalogue_of

Settings = dict[str, Any]

STYLE_KEEP = 1280
"""A style lies beside other styles that must stay. Four times as many kept images as for an object are not learned by
heart."""
STYLE_TRAIN: Settings = {
    "beta": 2.0,
    "keep_weight": 4.0,
    "anchor_weight": 2.0,
    "anchor_guidance": 5.0,
    "prompt_mode": "given",
    "batch_size": 12,
    "keep_batch_size": 8,
    "learning_rate": 2e-3,
}
"""Few and bold steps take a style out, and less of what other styles share with it, than many small ones. A steep
preference is content with a small margin: training does not go on pushing the style's tokens down. The anchor says the
rest, for a caption without a style draws every style. Without its prompt an unsafe image is hard to tell from those of
other styles. docs/method.md has the figures."""
LARGE_TRAIN: Settings = {"learning_rate": 1e-4}
"""Of models hundreds of times as large as the embedded one: EAR (arXiv 2506.20151) and Obliviate (arXiv 2606.28643)
train Janus-Pro-7B at this rate. Not measured here."""
DPO_TRAIN: Settings = {"beta": 0.1, "prompt_mode": "given"}
"""The sum of vanilla DPO wants a smaller slope than a mean."""


def default_settings(concept: str, base: str, method: str = "vsafe_dpo") -> Settings:
    """Keys of RunConfig, section by section, for a concept of the catalogue or a file.

    Steps grow with what is to be learned: a third more for each name beyond the first, for the names share the pairs.
    A concept's own file has the last word, but for vanilla DPO, whose slope is another.

    Raises:
        UserError: the concept is unknown.
    """
    known = load_concept(concept, catalogue_of(base))
    style = known.kind == "style"
    steps = TrainConfig().steps * (len(known.names) + 2) // 3
    vanilla = method == "dpo"
    train: Settings = {"method": method, "steps": steps}
    train |= DPO_TRAIN if vanilla else STYLE_TRAIN if style else {}
    train |= {} if base == EMBEDDED else LARGE_TRAIN
    train |= {} if vanilla else known.train
    pairs = ({"num_keep": STYLE_KEEP} if style else {}) | known.pairs
    return {"concept": concept, "base": base, "pairs": pairs, "train": train}


def merged(below: Settings, above: Mapping[str, Any]) -> Settings:
    """Settings of which `above` has the last word, section by section."""
    out = dict(below)
    for key, value in above.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
