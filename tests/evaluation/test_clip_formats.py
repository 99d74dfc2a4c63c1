"""CLIPs in the formats of open_clip, with random weights: softmax and sigmoid models; and detected concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_clips import SIGLIP_SCALE, save, siglip, vit
from tiny_runs import tiny_config

from tools.emoji_world import scenes
from tools.emoji_world.world import BACKGROUNDS, OBJECTS, STYLES
from vce_ray.concepts.concept import Concept
from vce_ray.config import EMBEDDED
from vce_ray.evaluation.clip_model import ClipModel
from vce_ray.evaluation.detectors.clip import ClipDetector
from vce_ray.evaluation.judge import check_judge, judge_folder

TEXTS = ["a deer", "a fox on a red background", "an owl", "nothing"]


@pytest.mark.parametrize("settings", [vit, siglip])
@torch.inference_mode()
def test_probabilities_are_those_that_the_model_was_trained_for(settings: Any, tmp_path: Path) -> None:
    reference = save(tmp_path / "clip", settings())
    assert check_judge(str(tmp_path / "clip")).startswith("in ")
    model = ClipModel(judge_folder(str(tmp_path / "clip")))
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    embeddings = model.encode_images(images)
    tokens = model._tokenizer(TEXTS)
    cosines = embeddings @ F.normalize(reference.encode_text(tokens), dim=-1).T
    index, probabilities = model.classify(embeddings, TEXTS)
    assert (index == cosines.argmax(-1).numpy()).all()
    if settings is siglip:
        expected = torch.sigmoid(SIGLIP_SCALE * cosines - 10)
        assert probabilities.sum(1).max() != pytest.approx(1, abs=1e-3), "each text is judged on its own"
    else:
        expected = (reference.logit_scale.exp() * cosines).softmax(-1)
    assert probabilities == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("settings", [vit, siglip])
def test_a_presence_of_half_or_more_means_that_the_closest_text_is_one_of_its_own(
    settings: Any, tmp_path: Path
) -> None:
    save(tmp_path / "clip", settings())
    model = ClipModel(tmp_path / "clip")
    images = np.random.default_rng(1).integers(0, 255, (40, 32, 32, 3), np.uint8)
    embeddings = model.encode_images(images)
    for own in (TEXTS[:1], TEXTS[:3]):
        rest = [text for text in TEXTS if text not in own]
        index, _ = model.classify(embeddings, [*own, *rest])
        presence = model.presence(embeddings, own, rest)
        assert ((presence >= 0.5) == (index < len(own))).all() and (presence >= 0).all() and (presence <= 1).all()
        assert presence == pytest.approx(1 - model.presence(embeddings, rest, own), abs=1e-5)
        assert model.presence(embeddings, own * 3, rest) == pytest.approx(presence, rel=1e-3)


def test_a_control_token_in_a_prompt_is_text(tmp_path: Path) -> None:
    save(tmp_path / "clip", vit())
    model = ClipModel(tmp_path / "clip")
    images = model.encode_images(np.random.default_rng(2).integers(0, 255, (1, 32, 32, 3), np.uint8))
    scores = [model.prompt_scores(images, [f"a deer <eos> {rest}"])[0] for rest in ("and a fox", "on red")]
    assert scores[0] != scores[1], "the text ends at the typed token"


DEER = {"name": "deer", "kind": "explicit", "names": ("deer",), "templates": ("a {name}",)}
SCENES = tuple(f"{style} emoji of an animal on a {colour} background" for style in STYLES for colour in BACKGROUNDS)
"""Labels that are as true of an image of a deer as 'deer' is."""
OTHERS = tuple(f"a picture of a {name}" for name in OBJECTS if name != "deer" and name[0] not in "aou")


def test_a_concept_that_is_detected_is_seen_whatever_else_an_image_shows() -> None:
    """A deer on red is also an animal on red: naming must choose one of the two, as of 'nude' and 'dancing'."""
    named = Concept(**DEER, keep=SCENES, labels=("deer", *SCENES))
    detected = named.model_copy(update={"seen_texts": ("a picture of a deer",), "unseen_texts": OTHERS})
    drawn = scenes.held_out(1200)
    deer = [image for scene, image in drawn if scene.thing == OBJECTS.index("deer")]
    other = [image for scene, image in drawn if scene.thing not in (None, OBJECTS.index("deer"))][: len(deer)]
    detector = ClipDetector(tiny_config(evaluation={"judge": (EMBEDDED,)}))
    encoded = detector.encode(np.stack(deer + other), [""] * (len(deer) + len(other)))

    def seen(concept: Concept) -> tuple[float, float]:
        rows = detector.detect(encoded, range(len(deer) + len(other)), concept)
        assert all(row["seen"] == (row["label"] == "deer") == row["clip"][0]["seen"] for row in rows)
        flags = [row["seen"] for row in rows]
        return float(np.mean(flags[: len(deer)])), float(np.mean(flags[len(deer) :]))

    assert len(deer) >= 15
    assert seen(named)[0] < 0.5, "many deer are named by their scene"
    shown, false_alarms = seen(detected)
    assert shown >= 0.95 and false_alarms <= 0.05


def test_several_clips_answer_and_the_first_one_names(tmp_path: Path) -> None:
    save(tmp_path / "clip", vit())
    save(tmp_path / "other", siglip())
    (tmp_path / "deep").mkdir()
    save(tmp_path / "deep" / "clip", siglip())
    folders = (EMBEDDED, str(tmp_path / "clip"), str(tmp_path / "other"), str(tmp_path / "deep" / "clip"))
    concept = Concept(**DEER, keep=("fox",), labels=("deer", "fox"))
    images = np.stack([image for _, image in scenes.held_out(6)])
    several, alone = (ClipDetector(tiny_config(evaluation={"judge": judges})) for judges in (folders, folders[:1]))
    prompts = ["a deer"] * 6
    rows = several.detect(several.encode(images, prompts), range(6), concept)
    names = ["the CLIP model that ships with vce_ray", "clip", "other", "clip (2)"]
    assert all([answer["judge"] for answer in row["clip"]] == names for row in rows)
    for row, expected in zip(rows, alone.detect(alone.encode(images, prompts), range(6), concept), strict=True):
        assert row | {"clip": row["clip"][:1]} == expected
