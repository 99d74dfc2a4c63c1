"""The steps `captions` and `safe` with endpoints, over real HTTP."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import GOOD, ChatServer, Response, completion

from vce_ray.concepts.concept import Concept
from vce_ray.concepts.load import load_concept
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.errors import CaptionerError
from vce_ray.pairs.answers import QUESTION, question_for
from vce_ray.pairs.caption import Describe
from vce_ray.pairs.endpoint import MAX_ANSWER_BYTES
from vce_ray.pairs.generate import DrawSafe
from vce_ray.pipeline.preflight import prepare

TOKEN = "the-token-of-this-test"


def index_by_image(images: list[dict[str, Any]]) -> dict[str, int]:
    """Return the index of each image by its base64, as it appears in requests."""
    return {base64.b64encode(row["image"]).decode(): i for i, row in enumerate(images)}


def test_each_answer_is_accepted_or_rejected_on_its_own(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept
) -> None:
    bodies = [
        completion("A brown deer on a red background. It looks to the left."),
        completion("I'm sorry, I can't describe this."),
        completion("A deer standing in the", "length"),
        completion("A red fox."),
        completion("word " * 200),
    ]
    index = index_by_image(images)
    server.respond = lambda _, image: bodies[index[image]]
    rows, rejects = Describe(server.name, {"a": deer})(images)
    assert [(row["sample_id"], row["caption"]) for row in rows] == [
        (images[0]["key"], "A brown deer on a red background. It looks to the left.")
    ]
    assert not deer.mentions(rows[0]["refined_caption"]) and "red background" in rows[0]["refined_caption"]
    assert [(row["row_id"], row["reason"]) for row in rejects] == [
        (images[1]["key"], "captioner refused"),
        (images[2]["key"], "caption cut off"),
        (images[3]["key"], "concept not in unsafe image"),
        (images[4]["key"], "caption too long"),
    ]
    assert rejects[0]["detail"] == "I'm sorry, I can't describe this."
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny" and request["temperature"] == 0
    assert request["messages"][0]["content"][1] == {"type": "text", "text": QUESTION}
    assert not deer.mentions(json.dumps([request["messages"][0]["content"][1] for request in server.requests]))
    assert server.tokens == [None] * len(images)


def test_unusable_responses_are_rejected(server: ChatServer, images: list[dict[str, Any]], deer: Concept) -> None:
    bodies = [
        completion(None, refusal="I can't help."),
        completion("A deer", "content_filter"),
        (400, {}, b'{"error": "content management policy"}'),
        (200, {}, b"<html>welcome</html>"),
        (200, {}, b'{"choices": [{"message": {"content": "' + b"deer " * (MAX_ANSWER_BYTES // 4) + b'"}}]}'),
    ]
    index = index_by_image(images)
    server.respond = lambda _, image: bodies[index[image]]
    rows, rejects = Describe(server.name, {"a": deer})(images)
    assert not rows
    reasons = [row["reason"] for row in rejects]
    assert reasons[:2] == ["captioner refused"] * 2
    assert reasons[2:] == ["captioner refused the picture", "answer is no chat completion", "answer too large"]
    assert rejects[2]["detail"].startswith("400") and "content management policy" in rejects[2]["detail"]


def test_a_refined_caption_that_still_mentions_the_concept_is_rejected(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check does not rely on the rules to be correct."""
    monkeypatch.setattr("vce_ray.pairs.caption.refine", lambda text, concept: text)
    server.respond = lambda number, _: completion("A deer on a hill.")
    rows, rejects = Describe(server.name, {"a": deer})(images[:1])
    assert not rows and [row["reason"] for row in rejects] == ["concept still in refined caption"]


def test_a_concept_in_a_later_sentence_is_not_missed(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept
) -> None:
    server.respond = lambda number, _: completion("A meadow with a red fence. A deer stands behind the fence.")
    rows, _ = Describe(server.name, {"a": deer})(images[:1])
    assert [(row["refined_caption"], row["removed_terms"]) for row in rows] == [
        ("A meadow with a red fence. An animal stands behind the fence.", ["deer"])
    ]


def test_what_is_no_prompt_is_rejected_with_its_reason(
    server: ChatServer, refiner: ChatServer, images: list[dict[str, Any]], deer: Concept
) -> None:
    """The refiner's answers are not trusted to be sentences."""
    server.respond = lambda number, _: completion("A deer stands beside a red barn in a green meadow under a blue sky.")
    answers = iter(["A red barn with.", "A dog.", "A creature beside a red barn in a green meadow under a blue sky."])
    refiner.respond = lambda number, _: completion(next(answers))
    describe = Describe(server.name, {"a": deer}, refiner.name, base=EMBEDDED)
    rejects = [reject for row in images[:3] for reject in describe([row])[1]]
    assert [row["reason"] for row in rejects] == ["refined caption is no prompt"] * 3
    assert [row["detail"].split(":")[0] for row in rejects] == [
        "'with' without an object",
        "most of the caption is lost",
        "the base does not know 'creature'",
    ]


def test_captioners_are_asked_for_the_style_of_images_whose_style_is_erased(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept
) -> None:
    server.respond = lambda number, _: completion("A deer in the style of noto.")
    noto = load_concept("noto")
    rows, _ = Describe(server.name, {"a": deer, "b": noto})([images[0], images[1] | {"run": "b"}])
    questions = {request["messages"][0]["content"][1]["text"] for request in server.requests}
    assert questions == {question_for("object"), question_for("style")}
    assert [row["refined_caption"] for row in rows] == ["An animal in the style of noto.", "A deer."]


def test_temporary_errors_are_retried(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN + "\n")
    attempts: dict[str, int] = {}

    def respond(number: int, image: str) -> Response:
        attempts[image] = attempts.get(image, 0) + 1
        busy = [(503, {}, b"loading"), (429, {"Retry-After": "1"}, b"slow down")]
        return busy[attempts[image] - 1] if attempts[image] <= 2 else completion(GOOD)

    server.respond = respond
    started = time.monotonic()
    rows, rejects = Describe(server.name, {"a": deer})(images[:2])
    assert len(rows) == 2 and not rejects and set(attempts.values()) == {3}
    assert time.monotonic() - started >= 1.0  # Retry-After
    assert set(server.tokens) == {f"Bearer {TOKEN}"}


def test_an_image_without_an_answer_is_rejected_alone(
    server: ChatServer, images: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "2")
    index = index_by_image(images)
    server.respond = lambda _, image: (500, {}, b"out of memory") if index[image] == 1 else completion(GOOD)
    rows, rejects = Describe(server.name, {"a": deer})(images)
    assert len(rows) == 4
    assert [(row["row_id"], row["reason"]) for row in rejects] == [(images[1]["key"], "captioner gave no answer")]
    assert "500" in rejects[0]["detail"] and "out of memory" in rejects[0]["detail"]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "VCE_RAY_CAPTIONER_TOKEN"), (404, "URL and the model"), (302, "correct its URL")]
)
def test_a_wrong_token_or_url_raises_and_rejects_no_row(
    server: ChatServer,
    images: list[dict[str, Any]],
    deer: Concept,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    message: str,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN)
    elsewhere = ChatServer()
    headers = {"Location": elsewhere.name.replace("#tiny", "/chat/completions")}
    server.respond = lambda *_: (status, headers, f"forbidden: {TOKEN}".encode())
    with pytest.raises(CaptionerError, match=message) as error:
        Describe(server.name, {"a": deer})(images)
    assert TOKEN not in str(error.value) and str(status) in str(error.value)
    assert not elsewhere.requests, "a redirect was followed"
    elsewhere.close()


def test_an_unreachable_endpoint_raises_at_the_deadline(
    images: list[dict[str, Any]],
    deer: Concept,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "1")
    started = time.monotonic()
    with pytest.raises(CaptionerError, match=r"no answer within 1 s: URLError: .*refused"):
        Describe(f"http://127.0.0.1:{free_port()}/v1#m", {"a": deer})(images * 10)
    assert time.monotonic() - started < 10


def test_a_refiner_rewrites_captions_before_the_rules_are_applied(
    server: ChatServer,
    refiner: ChatServer,
    images: list[dict[str, Any]],
    deer: Concept,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN)
    monkeypatch.setenv("VCE_RAY_REFINER_TOKEN", "another-token")
    index = index_by_image(images)
    captions = ["A deer on snow.", "A deer on sand.", "A deer on grass.", "A deer.", "A red fox."]
    rewritten = {
        "A deer on snow.": completion("Sure! Here it is: Snow, with the tracks of an animal."),
        "A deer on sand.": completion("A young deer lies on yellow sand."),
        "A deer on grass.": completion("I'm sorry, I can't help with that."),
        "A deer.": completion("A picture."),
    }
    server.respond = lambda _, image: completion(captions[index[image]])
    refiner.respond = lambda _, text: rewritten[text.split("\n\n")[1]]
    rows, rejects = Describe(server.name, {"a": deer}, refiner.name)(images)
    assert [(row["caption"], row["refined_caption"], row["removed_terms"]) for row in rows] == [
        ("A deer on snow.", "Snow, with the tracks of an animal.", ["deer"]),
        ("A deer on sand.", "A young animal lies on yellow sand.", ["deer"]),  # the refiner left the concept in
        ("A deer on grass.", "An animal on grass.", ["deer"]),  # the refiner refused
    ]
    assert [row["reason"] for row in rejects] == ["nothing left of the caption", "concept not in unsafe image"]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("vce_ray")] == [
        "refiner unusable, using rules only: refiner refused (I'm sorry, I can't help with that.)"
    ]
    prompts = [request["messages"][0]["content"][0]["text"] for request in refiner.requests]
    assert len(prompts) == 4 and all("nothing of: 'deer'" in text and "say 'animal'" in text for text in prompts)
    assert set(server.tokens) == {f"Bearer {TOKEN}"} and set(refiner.tokens) == {"Bearer another-token"}


def test_an_unusable_refiner_raises_and_rejects_no_row(
    server: ChatServer, refiner: ChatServer, images: list[dict[str, Any]], deer: Concept, tmp_path: Path
) -> None:
    refiner.respond = lambda *_: (401, {}, b"no token")
    with pytest.raises(CaptionerError, match=r"refiner http.* 401 .*VCE_RAY_REFINER_TOKEN"):
        Describe(server.name, {"a": deer}, refiner.name)(images)
    for name, message in (
        (EMBEDDED, "refiner 'emoji-world' is not an endpoint"),
        ("https://me:hunter2@host/v1#m", "VCE_RAY_REFINER_TOKEN"),
        ("http://example.com/v1#m", "refiner .* give https://"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare({"concept": "deer", "store": str(tmp_path), "refiner": name})


def test_safe_images_are_redrawn_until_their_caption_is_free_of_the_concept(server: ChatServer, deer: Concept) -> None:
    answers = ["A brown animal. Behind it is a deer.", "I'm sorry, I can't.", "A brown animal."]
    server.respond = lambda number, _: completion(answers[number])
    row = {"run": "a", "key": "s", "sample_id": "s", "prompt": "a deer", "tokens": [0] * 64}
    row["refined_caption"] = "an animal in the style of noto on a red background"
    sampling = SamplingConfig(guidance_scale=2.0, temperature=0.7)
    rows, rejects = DrawSafe(EMBEDDED, server.name, sampling, {"a": deer}, attempts=3)([row])
    assert not rejects and rows[0]["attempt"] == 3 and rows[0]["check_caption"] == "A brown animal."
    server.requests.clear()
    rows, rejects = DrawSafe(EMBEDDED, server.name, sampling, {"a": deer}, attempts=2)([row])
    assert not rows and rejects[0]["reason"] == "safe image unchecked: captioner refused"
    assert rejects[0]["attempt"] == 2 and rejects[0]["detail"] == "I'm sorry, I can't."
