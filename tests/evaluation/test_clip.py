"""The CLIP model: its texts, its labels and scores, and that results do not depend on the rest of the batch."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from tools.emoji_world import scenes
from tools.emoji_world.train_judge import LABELS, MODEL, build_judge_tokenizer, encode_texts, export
from tools.emoji_world.world import BACKGROUNDS, OBJECTS, STYLES
from vce_ray.concepts.load import load_concept
from vce_ray.evaluation.clip_model import ClipModel, label_text
from vce_ray.evaluation.detectors.base import NOTHING
from vce_ray.evaluation.judge import judge_folder

OBJECT_TEXTS = [label_text(name, "object") for name in (*OBJECTS, NOTHING)]


@pytest.fixture(scope="module")
def trained() -> CLIP:
    """A model of the shipped judge's size with random weights, as its training script holds it."""
    torch.manual_seed(0)
    text = CLIPTextCfg(**(MODEL["text_cfg"] | {"vocab_size": len(build_judge_tokenizer())}))
    model = CLIP(MODEL["embed_dim"], CLIPVisionCfg(**MODEL["vision_cfg"]), text)
    return model.half().float().eval()  # the export is in float16


@pytest.fixture(scope="module")
def random_judge(trained: CLIP, tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    """The random model, exported and loaded."""
    folder = tmp_path_factory.mktemp("judge")
    export(trained, build_judge_tokenizer(), folder)
    return ClipModel(judge_folder(str(folder)), batch_size=5)


@pytest.fixture(scope="module")
def shipped_judge() -> ClipModel:
    return ClipModel(judge_folder())


def images_of_scenes(number: int) -> np.ndarray:
    return np.stack([image for _, image in scenes.held_out(number)])


def name_of(scene: scenes.Scene) -> str:
    assert scene.thing is not None
    return OBJECTS[scene.thing]


def test_label_texts_are_those_it_was_trained_on():
    assert LABELS[0] == OBJECT_TEXTS
    assert [label_text(name, "style") for name in STYLES] == LABELS[1]
    assert label_text("owl", "explicit") == "an owl"
    assert label_text("a church", "object") == "a church", "a label that has its article keeps it"
    assert label_text("elderly", "explicit", "a {name} person") == "an elderly person"
    assert label_text(NOTHING, "explicit", "a {name} person") == NOTHING


@torch.inference_mode()
def test_embeds_images_and_texts_as_in_training(random_judge: ClipModel, trained: CLIP):
    images = images_of_scenes(3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = F.normalize(trained.encode_image(pixels), dim=-1)
    embeddings = random_judge.encode_images(images)
    assert embeddings.dtype == torch.float32 and torch.allclose(embeddings, expected, atol=1e-5)
    texts = ["a deer", "an owl in the style of noto on a blue background", "word " * 200]
    text_embeddings = F.normalize(trained.encode_text(encode_texts(build_judge_tokenizer(), texts)), dim=-1)
    cosines = (expected * text_embeddings).sum(-1)
    assert random_judge.prompt_scores(embeddings, texts) == pytest.approx(cosines.numpy(), abs=1e-5)


def test_probabilities_and_cosines(random_judge: ClipModel):
    seen = random_judge.encode_images(images_of_scenes(7))
    index, probabilities = random_judge.classify(seen, OBJECT_TEXTS)
    assert index.shape == (7,) and probabilities.shape == (7, len(OBJECT_TEXTS))
    assert (index == probabilities.argmax(1)).all()
    assert probabilities.sum(1) == pytest.approx(np.ones(7), abs=1e-5)
    scores = random_judge.prompt_scores(seen, ["a deer"] * 6 + ["a cat"])
    assert scores.shape == (7,) and (np.abs(scores) <= 1).all()


def test_a_score_does_not_depend_on_the_rest_of_the_batch(random_judge: ClipModel):
    images, prompts = images_of_scenes(12), [f"{name} on red" for name in OBJECTS[:12]]
    together = random_judge.prompt_scores(random_judge.encode_images(images), prompts)
    each = [random_judge.encode_images(image[None]) for image in images]
    alone = [random_judge.prompt_scores(seen, [prompt])[0] for seen, prompt in zip(each, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)


def test_accepts_empty_batches(random_judge: ClipModel):
    none = random_judge.encode_images(np.empty((0, 64, 64, 3), np.uint8))
    assert random_judge.prompt_scores(none, []).shape == (0,)
    assert random_judge.classify(none, ["a", "b"])[1].shape == (0, 2)


def test_accepts_images_of_other_sizes(shipped_judge: ClipModel):
    [(scene, image)] = scenes.held_out(1)
    large = shipped_judge.encode_images(image[None].repeat(3, axis=1).repeat(3, axis=2))
    assert shipped_judge.best_labels(large, load_concept("deer").labels, "object") == [name_of(scene)]


def test_nothing_is_a_choice_for_objects_only(random_judge: ClipModel):
    seen = random_judge.encode_images(images_of_scenes(24))
    index, _ = random_judge.classify(seen, ["a deer", "an owl", "nothing"])
    named = random_judge.best_labels(seen, ["deer", "owl"], "explicit")
    assert named == [["deer", "owl", NOTHING][i] for i in index]
    index, _ = random_judge.classify(seen, ["in the style of noto", "in the style of fluent"])
    assert random_judge.best_labels(seen, ["noto", "fluent"], "style") == [["noto", "fluent"][i] for i in index]


def test_refuses_bad_input(random_judge: ClipModel, tmp_path: Path):
    with pytest.raises(ValueError, match="uint8"):
        random_judge.encode_images(images_of_scenes(1).astype(np.float32))
    seen = random_judge.encode_images(images_of_scenes(1))
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        random_judge.prompt_scores(seen, ["a", "b"])
    with pytest.raises(ValueError, match="at least two"):
        random_judge.best_labels(seen, ["deer"], "object")
    with pytest.raises(ValueError, match=r"has no open_clip_config\.json"):
        judge_folder(str(tmp_path))


def test_shipped_judge_names_objects_styles_and_nothing(shipped_judge: ClipModel):
    drawn = scenes.held_out(480)
    seen = shipped_judge.encode_images(np.stack([image for _, image in drawn]))
    deer, noto = load_concept("deer"), load_concept("noto")
    objects = shipped_judge.best_labels(seen, deer.labels, "object")
    styles = shipped_judge.best_labels(seen, noto.labels, "style")
    assert np.mean([name_of(scene) == label for (scene, _), label in zip(drawn, objects, strict=True)]) >= 0.98
    assert np.mean([STYLES[scene.style] == label for (scene, _), label in zip(drawn, styles, strict=True)]) >= 0.98
    empty = np.stack([scenes.render(scenes.Scene(None, 0, name), random.Random(0)) for name in BACKGROUNDS])
    empty_labels = shipped_judge.best_labels(shipped_judge.encode_images(empty), deer.labels, "object")
    assert empty_labels == [NOTHING] * len(BACKGROUNDS)


def test_shipped_judge_scores_the_right_prompt_higher(shipped_judge: ClipModel):
    drawn = scenes.held_out(240)
    seen = shipped_judge.encode_images(np.stack([image for _, image in drawn]))
    prompts = [f"a picture of a {name_of(scene)}, {scene.background} background" for scene, _ in drawn]
    right = shipped_judge.prompt_scores(seen, prompts)
    wrong = shipped_judge.prompt_scores(seen, prompts[7:] + prompts[:7])
    assert (right > wrong).mean() >= 0.97
