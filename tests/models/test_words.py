"""Closed vocabularies: case and punctuation do not matter to the embedded model, and other models get them as given."""

from __future__ import annotations

import logging
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.emoji_world import world
from vce_ray.api import draw as draw_images
from vce_ray.concepts.load import catalogue, load_concept
from vce_ray.concepts.wording import fix_articles
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import UserError
from vce_ray.evaluation.clip_model import ClipModel
from vce_ray.evaluation.detectors.clip import judge_folder
from vce_ray.models.folder import base_stamp, model_folder
from vce_ray.models.janus import Janus
from vce_ray.models.load import load_model
from vce_ray.models.words import WORDS, Vocabulary, normalize, vocabulary_of
from vce_ray.pipeline.preflight import prepare
from vce_ray.sampling import draw
from vce_ray.training.reference import reference_log_probs

SAME = {
    "deer": [
        "Deer",
        "DEER",
        "Deer!",
        " deer ",
        "\u201cdeer\u201d",
        "\u2018Deer\u2019",
        "'deer'",
        "(deer)...",
        "\uff24eer",
    ],
    "a deer": ["a Deer.", " a  deer ", "A\u00a0deer", "a\tdeer?", "a \u201cdeer\u201d", "*a* _deer_"],
    "deer, noto style, blue background": ["Deer; Noto style. Blue background!", "deer ,noto style,, blue background,"],
}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(2)
    return load_model()


@pytest.fixture(scope="module")
def judge() -> ClipModel:
    return ClipModel(judge_folder())


@pytest.mark.parametrize("plain", SAME)
def test_case_and_punctuation_do_not_change_what_is_drawn(model, plain: str) -> None:
    prompts = [plain, *SAME[plain]]
    tokens = draw(model, prompts, [7] * len(prompts), SamplingConfig(guidance_scale=2.0, temperature=0.7))
    assert len(torch.unique(tokens, dim=0)) == 1


def test_nor_its_log_probs_and_scores(model, judge: ClipModel) -> None:
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    chosen, rejected = reference_log_probs(model, ["a deer", "A Deer!"], False, tokens[:1].expand(2, -1), tokens)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(rejected[0], rejected[1])
    embeddings = judge.encode_images(np.zeros((2, 64, 64, 3), np.uint8))
    scores = judge.prompt_scores(
        embeddings, ["a deer on a blue background", " A DEER on a \u201cblue\u201d background."]
    )
    assert scores[0] == scores[1]


def test_prompts_of_the_catalogue_are_their_own_normal_form(model) -> None:
    prompts: set[str] = set()
    for name in catalogue(EMBEDDED):
        concept = load_concept(name)
        prompts |= {*concept.keep_prompts, *concept.labels, *(f"in the style of {label}" for label in world.STYLES)}
        for template in concept.templates + concept.held_out_templates:
            slots = {slot: values for slot, values in concept.slots.items() if f"{{{slot}}}" in template}
            for subject, *fillings in product(concept.names + concept.keep, *slots.values()):
                filled = template.format(name=subject, **dict(zip(slots, fillings, strict=True)))
                prompts.add(fix_articles(filled))
    vocabulary = vocabulary_of(EMBEDDED)
    assert vocabulary is not None and len(prompts) > 17_000
    assert [prompt for prompt in prompts if normalize(prompt) != prompt] == [], "their token ids would change"
    assert vocabulary.problem(prompts) is None
    some = sorted(prompts)[::500]
    ids = model.tokenizer(some, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(model.encode_prompts(some).embeds_BPE[:, :-1], model.language_model.embed_tokens(ids))


def test_the_files_list_the_words_of_the_world() -> None:
    known = vocabulary_of(EMBEDDED)
    assert known is not None and tuple(known.words) == world.WORDS
    judging = Vocabulary.of(judge_folder())
    assert judging is not None and set(judging.words) == {*world.WORDS, "nothing"}


def test_the_words_are_no_part_of_the_revision_and_travel_with_the_folder(tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder(EMBEDDED), tmp_path / "copy")
    stamp = base_stamp(str(folder))
    assert stamp == base_stamp(EMBEDDED)
    copied = vocabulary_of(str(folder))
    assert copied is not None and tuple(copied.words) == world.WORDS
    (folder / WORDS).unlink()
    assert base_stamp(str(folder)) == stamp and vocabulary_of(str(folder)) is None
    assert vocabulary_of("owner/model") is None


def test_prompts_of_other_models_are_only_stripped(model) -> None:
    other = Janus(model.net, model.processor, revision="open")
    for prompt in ("Deer", "DEER", "a Deer.", "\u201cdeer\u201d", "!!!", "a  deer"):
        row = torch.tensor(model.tokenizer(prompt)["input_ids"])
        assert torch.equal(
            other.encode_prompts([f" {prompt} "]).embeds_BPE[0, :-1], model.language_model.embed_tokens(row)
        )


def test_drawing_warns_of_unknown_words(model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw_images(model, ["a Deer!", "draw a puppy on blue"])
        assert not caplog.records
        draw_images(model, ["a zebra", "a deer", "two cats in a zoo"])
    message = caplog.messages[0]
    assert "2 of 3 contain words that the model does not know: 'zebra', 'two', 'cats' (did you mean cat?)" in message
    assert "It knows cat, dog, deer" in message
    with pytest.raises(UserError, match="prompt '!!!' has no word"):
        draw_images(model, ["a deer", "!!!"])


def test_a_prompts_file_may_not_contain_unknown_words(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a Deer!\na photo of a deer\nphoto: deer in the snow\n\N{DEER}\n")
    settings = {"concept": "deer", "store": str(tmp_path), "prompts_file": str(path)}
    with pytest.raises(
        UserError, match=r"prompts.txt: 3 of 4 contain words .*: 'photo', 'snow', '\N{DEER}'. It knows cat"
    ):
        prepare(settings)
    path.write_text("a Deer!\n\u201ca stag\u201d on a blue background.\n")
    assert prepare(settings).config.prompts_file == str(path)
