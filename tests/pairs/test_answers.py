"""How answers of models are cleaned up, and which ones are rejected."""

from __future__ import annotations

import time

import pytest

from vce_ray.concepts.load import catalogue, load_concept
from vce_ray.pairs.answers import MAX_CAPTION_LENGTH, QUESTION, clean, question_for


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" a deer in the style of noto\non a red background ", "a deer in the style of noto on a red background"),
        ('"A deer."', "A deer."),
        ("\u201cA deer.\u201d", "A deer."),
        ('A sign that says "no".', 'A sign that says "no".'),
        ("A deer. It has antlers. The sky is blue.", "A deer. It has antlers. The sky is blue."),
        ("A St. Bernard and Mr. Fox. They run.", "A St. Bernard and Mr. Fox. They run."),
        ("A hill. As an AI, I see no deer. It is green.", "A hill. It is green."),
        ("Sure! Here is a description of the image: **A deer** on red.", "A deer on red."),
        ("Certainly. A deer.", "A deer."),
        ("Caption: a deer", "a deer"),
        ("A deer stands in snow:\n\n- brown fur\n- antlers", "A deer stands in snow:"),
        ("<think>I cannot see. Is it a fox?</think>\n\nA deer.", "A deer."),
        ("A sorry-looking dog afraid of rain.", "A sorry-looking dog afraid of rain."),
        ("A poster that says I can fly.", "A poster that says I can fly."),
        ("A deer. I cannot tell its age.", "A deer."),
    ],
)
def test_answers_become_captions(answer: str, text: str) -> None:
    caption = clean(answer)
    assert (caption.text, caption.error) == (text, "")


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot describe this image.",
        "Sorry, this is not something I describe.",
        "I cannot assist with that request.",
        "I am unable to see images.",
        "As an AI, I have no eyes.",
        "Unfortunately the image is not shown.",
        "I apologize, but no.",
        "This content violates our content policy.",
        "I won't describe that.",
    ],
)
def test_refusals_are_recognized(answer: str) -> None:
    caption = clean(answer)
    assert (caption.text, caption.error) == ("", "captioner refused")
    assert caption.answer


def test_truncated_empty_and_overlong_answers_are_errors() -> None:
    assert clean("A deer in the", cut_off=True).error == "caption cut off"
    assert clean("A deer in snow. It is", cut_off=True).text == "A deer in snow."  # the first sentence is complete
    assert clean("A deer in snow. It is", cut_off=True).answer == "A deer in snow. It is"
    assert clean("<think>Is it a", cut_off=True).error == "caption cut off"
    assert clean(" \n ").error == clean("<think>Hm.</think>").error == clean('""').error == "empty caption"
    assert clean("deer " * MAX_CAPTION_LENGTH).error == "caption too long"
    long = clean("A deer in snow. " + "It is cold. " * MAX_CAPTION_LENGTH)
    assert len(long.text) <= MAX_CAPTION_LENGTH and long.text.endswith("It is cold.") and not long.error
    assert clean("A deer.", refused=True).error == "captioner refused"
    started = time.process_time()
    for hostile in ("(" * 100_000, "I " * 50_000, "<think>" * 20_000, "A. " * 30_000, "\n" * 100_000, "is " * 30_000):
        clean(hostile)
    assert time.process_time() - started < 5


def test_the_style_is_asked_for_when_a_style_is_erased() -> None:
    assert question_for("object") == question_for("explicit") == QUESTION
    assert "style" in question_for("style") and "artist" in question_for("style")
    for name in catalogue("some/model"):
        concept = load_concept(name, "some/model")
        assert not concept.mentions(question_for(concept.kind)), "the question must not suggest the answer"
