"""Captioners: what becomes of answers, and an endpoint over real HTTP, through the steps that ask it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vce_ray.concepts.concept import Concept, load_concept
from vce_ray.config import SamplingConfig
from vce_ray.errors import CaptionerError
from vce_ray.models.load import base_model
from vce_ray.pairs.caption import Describe
from vce_ray.pairs.captioner import (
    LONGEST,
    QUESTION,
    CaptionerRef,
    check_captioner,
    checks_safe_images,
    clean,
    open_captioner,
    parse_captioner,
)
from vce_ray.pairs.endpoint import LARGEST
from vce_ray.pairs.generate import DrawSafe, DrawUnsafe
from vce_ray.pairs.images import from_png
from vce_ray.pairs.refine import Refined
from vce_ray.pipeline.run import Run
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

GOOD = "A brown deer stands on a red background."
TOKEN = "the-token-of-this-test"


class Server:
    """An endpoint that answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.answers: Callable[[int, str], tuple[int, dict[str, str], bytes]] = lambda *_: completion(GOOD)
        """From the number of a request and its picture (base64), or its text, to status, headers and body."""
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    number = len(endpoint.asked)
                    endpoint.asked.append(asked | {"path": self.path})
                    endpoint.tokens.append(self.headers.get("Authorization"))
                about = asked["messages"][0]["content"][0]
                about = about.get("text") or about["image_url"]["url"].removeprefix("data:image/png;base64,")
                status, headers, body = endpoint.answers(number, about)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.name = f"http://127.0.0.1:{self.http.server_port}/v1#tiny"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def completion(text: Any, finish: str = "stop", **message: Any) -> tuple[int, dict[str, str], bytes]:
    """A chat completion as servers send it."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An endpoint, and a deadline that a test can wait for."""
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "5")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def pictures() -> list[dict[str, Any]]:
    """Rows of five pictures that the embedded model drew."""
    prompts = [f"a deer in the style of noto on a {colour} background" for colour in ("red", "blue", "green")]
    prompts += ["a fox in the style of noto on a red background", "a whale in the style of noto on a blue background"]
    rows = [
        {"run": "a", "key": str(i), "prompt_id": str(i), "prompt": prompt, "kind": "erase", "name": "deer", "seed": i}
        for i, prompt in enumerate(prompts)
    ]
    drawn, _ = DrawUnsafe("emoji-world", SamplingConfig(guidance_scale=2.0, temperature=0.7))(rows)
    return [row | {"key": row["sample_id"]} for row in drawn]


@pytest.fixture(scope="module")
def deer() -> Concept:
    return load_concept("deer")


def numbered(pictures: list[dict[str, Any]]) -> dict[str, int]:
    """The number of each picture by its base64."""
    return {base64.b64encode(row["image"]).decode(): i for i, row in enumerate(pictures)}


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_are_taken_apart() -> None:
    assert parse_captioner("emoji-world") == CaptionerRef("base", "emoji-world")
    assert parse_captioner("deepseek-community/Janus-Pro-7B@main").kind == "base"
    assert parse_captioner("s3://bucket/janus").kind == "base"
    assert parse_captioner("vllm:Qwen/Qwen2.5-VL-7B-Instruct") == CaptionerRef("vllm", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert parse_captioner("https://host:8443/v1/#a/b") == CaptionerRef("endpoint", "a/b", "https://host:8443/v1")
    for host in ("localhost:8000", "127.0.0.2", "[::1]:8000"):
        assert parse_captioner(f"http://{host}/v1#m").url == f"http://{host}/v1"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vllm:", "give a folder or a hub id"),
        ("vllm:Qwen/Qwen2.5-VL@main", "without a revision"),
        ("https://host/v1", "names no host or no model"),
        ("https:///v1#m", "names no host or no model"),
        ("http://example.com/v1#m", "give https://"),
        ("http://127.0.0.1.example.com/v1#m", "give https://"),
        ("https://me:hunter2@host/v1#m", "VCE_RAY_CAPTIONER_TOKEN"),
        ("https://host/v1?key=hunter2#m", "VCE_RAY_CAPTIONER_TOKEN"),
        ("https://host:hunter2/v1#m", "cannot be read"),
    ],
)
def test_names_that_cannot_be_used_are_refused_and_no_password_is_repeated(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        parse_captioner(name)
    if "@host" in name or "?" in name:
        assert "hunter2" not in str(error.value)


def test_a_run_refuses_a_captioner_before_any_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give https://"):
        Run(RunConfig(concept="deer", store=str(tmp_path), captioner="http://example.com/v1#m"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vce_ray\[vllm\]"):
        Run(RunConfig(concept="deer", store=str(tmp_path), captioner="vllm:Qwen/Qwen2.5-VL-7B-Instruct"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a stage of its own"):
        open_captioner("vllm:Qwen/Qwen2.5-VL-7B-Instruct")


def test_safe_pictures_are_checked_by_the_captioner_or_by_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_safe_images("https://host/v1#m", "base") == "https://host/v1#m"
    assert checks_safe_images("vllm:a/b", "base") == "base"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_captioner("vllm:a/b", "emoji-world")
    monkeypatch.setattr("vce_ray.pairs.captioner.reads_images", lambda ref: False)
    with pytest.raises(ValueError, match="cannot describe the safe ones: serve the model"):
        check_captioner("vllm:a/b", "llamagen")


# What becomes of an answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" a deer in the style of noto\non a red background ", "a deer in the style of noto on a red background"),
        ('"A deer."', "A deer."),
        ("\u201cA deer.\u201d", "A deer."),
        ('A sign that says "no".', 'A sign that says "no".'),
        ("A deer. It has antlers. The sky is blue.", "A deer."),
        ("A St. Bernard and Mr. Fox. They run.", "A St. Bernard and Mr. Fox."),
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
def test_answers_become_one_sentence(answer: str, text: str) -> None:
    caption = clean(answer)
    assert (caption.text, caption.fault) == (text, "")


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
def test_refusals_are_known(answer: str) -> None:
    caption = clean(answer)
    assert (caption.text, caption.fault) == ("", "captioner refused")
    assert caption.said


def test_what_is_cut_off_empty_or_too_long_is_a_fault() -> None:
    assert clean("A deer in the", cut_off=True).fault == "caption cut off"
    assert clean("A deer in snow. It is", cut_off=True).text == "A deer in snow."  # the first sentence is whole
    assert clean("<think>Is it a", cut_off=True).fault == "caption cut off"
    assert clean(" \n ").fault == clean("<think>Hm.</think>").fault == clean('""').fault == "empty caption"
    assert clean("deer " * LONGEST).fault == "caption too long"
    assert clean("A deer.", refused=True).fault == "captioner refused"
    started = time.process_time()
    for hostile in ("(" * 100_000, "I " * 50_000, "<think>" * 20_000, "A. " * 30_000, "\n" * 100_000, "is " * 30_000):
        clean(hostile)
    assert time.process_time() - started < 5


# The endpoint, through the steps that ask it --------------------------------------------------------------------------


def test_each_answer_is_judged_by_itself(server: Server, pictures: list[dict[str, Any]], deer: Concept) -> None:
    bodies = [
        completion("A brown deer on a red background. It looks to the left."),
        completion("I'm sorry, I can't describe this."),
        completion("A deer standing in the", "length"),
        completion("A red fox."),
        completion("word " * 200),
    ]
    place = numbered(pictures)
    server.answers = lambda number, picture: bodies[place[picture]]
    made, rejects = Describe(server.name, {"a": deer})(pictures)
    assert [(row["sample_id"], row["caption"]) for row in made] == [
        (pictures[0]["key"], "A brown deer on a red background.")
    ]
    assert not deer.mentions(made[0]["refined_caption"]) and "red background" in made[0]["refined_caption"]
    assert [(row["row_id"], row["reason"]) for row in rejects] == [
        (pictures[1]["key"], "captioner refused"),
        (pictures[2]["key"], "caption cut off"),
        (pictures[3]["key"], "concept not in unsafe image"),
        (pictures[4]["key"], "caption too long"),
    ]
    assert rejects[0]["detail"] == "I'm sorry, I can't describe this."
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "tiny" and asked["temperature"] == 0
    assert asked["messages"][0]["content"][1] == {"type": "text", "text": QUESTION}
    assert not deer.mentions(json.dumps([row["messages"][0]["content"][1] for row in server.asked]))
    assert server.tokens == [None] * len(pictures)


def test_other_answers_that_are_of_no_use(server: Server, pictures: list[dict[str, Any]], deer: Concept) -> None:
    bodies = [
        completion(None, refusal="I can't help."),
        completion("A deer", "content_filter"),
        (400, {}, b'{"error": "content management policy"}'),
        (200, {}, b"<html>welcome</html>"),
        (200, {}, b'{"choices": [{"message": {"content": "' + b"deer " * (LARGEST // 4) + b'"}}]}'),
    ]
    place = numbered(pictures)
    server.answers = lambda number, picture: bodies[place[picture]]
    made, rejects = Describe(server.name, {"a": deer})(pictures)
    assert not made
    reasons = [row["reason"] for row in rejects]
    assert reasons[:2] == ["captioner refused"] * 2
    assert reasons[2:] == ["captioner refused the picture", "answer is no chat completion", "answer too large"]
    assert rejects[2]["detail"].startswith("400") and "content management policy" in rejects[2]["detail"]


def test_a_caption_that_still_names_the_concept_is_rejected(
    server: Server, pictures: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check does not trust the rules: they know no grammar, and one of them may leave a term where it is."""
    monkeypatch.setattr("vce_ray.pairs.caption.refine", lambda text, concept: Refined(text, concept.mentions(text)))
    server.answers = lambda number, _: completion("A deer on a hill.")
    made, rejects = Describe(server.name, {"a": deer})(pictures[:1])
    assert not made and [row["reason"] for row in rejects] == ["concept still in refined caption"]


def test_what_may_yet_succeed_is_tried_again(
    server: Server, pictures: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN + "\n")
    seen: dict[str, int] = {}

    def answers(number: int, picture: str) -> tuple[int, dict[str, str], bytes]:
        seen[picture] = seen.get(picture, 0) + 1
        busy = [(503, {}, b"loading"), (429, {"Retry-After": "1"}, b"slow down")]
        return busy[seen[picture] - 1] if seen[picture] <= 2 else completion(GOOD)

    server.answers = answers
    started = time.monotonic()
    made, rejects = Describe(server.name, {"a": deer})(pictures[:2])
    assert len(made) == 2 and not rejects and set(seen.values()) == {3}
    assert time.monotonic() - started >= 1.0  # it was asked to wait so long
    assert set(server.tokens) == {f"Bearer {TOKEN}"}


def test_a_picture_without_an_answer_is_rejected_alone(
    server: Server, pictures: list[dict[str, Any]], deer: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "2")
    place = numbered(pictures)
    server.answers = lambda _, picture: (500, {}, b"out of memory") if place[picture] == 1 else completion(GOOD)
    made, rejects = Describe(server.name, {"a": deer})(pictures)
    assert len(made) == 4
    assert [(row["row_id"], row["reason"]) for row in rejects] == [(pictures[1]["key"], "captioner gave no answer")]
    assert "500" in rejects[0]["detail"] and "out of memory" in rejects[0]["detail"]


@pytest.mark.parametrize(
    ("status", "told"), [(401, "VCE_RAY_CAPTIONER_TOKEN"), (404, "address and model"), (302, "correct its address")]
)
def test_a_wrong_token_or_address_is_no_fault_of_a_row(
    server: Server,
    pictures: list[dict[str, Any]],
    deer: Concept,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    told: str,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN)
    elsewhere = Server()
    headers = {"Location": elsewhere.name.replace("#tiny", "/chat/completions")}
    server.answers = lambda *_: (status, headers, f"no right: {TOKEN}".encode())
    with pytest.raises(CaptionerError, match=told) as error:
        Describe(server.name, {"a": deer})(pictures)
    assert TOKEN not in str(error.value) and str(status) in str(error.value)
    assert not elsewhere.asked, "a redirect was followed"
    elsewhere.http.shutdown()
    elsewhere.http.server_close()


def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", "a\r\nX-Other: b")
    with pytest.raises(ValueError, match="holds blanks") as error:
        Run(RunConfig(concept="deer", store=str(tmp_path), captioner="https://host/v1#m"))
    assert "X-Other" not in str(error.value)


def test_an_endpoint_that_is_not_there_ends_the_run_at_the_deadline(
    pictures: list[dict[str, Any]],
    deer: Concept,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_DEADLINE_S", "1")
    started = time.monotonic()
    with pytest.raises(CaptionerError, match=r"no answer within 1 s: URLError: .*refused"):
        Describe(f"http://127.0.0.1:{free_port()}/v1#m", {"a": deer})(pictures * 10)
    assert time.monotonic() - started < 10


@pytest.fixture
def refiner(server: Server) -> Iterator[Server]:
    """A second endpoint, which is given captions."""
    refiner = Server()
    yield refiner
    refiner.http.shutdown()
    refiner.http.server_close()


def test_a_refiner_rewrites_and_the_rules_go_over_what_it_says(
    server: Server,
    refiner: Server,
    pictures: list[dict[str, Any]],
    deer: Concept,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VCE_RAY_CAPTIONER_TOKEN", TOKEN)
    monkeypatch.setenv("VCE_RAY_REFINER_TOKEN", "another-token")
    place = numbered(pictures)
    said = ["A deer on snow.", "A deer on sand.", "A deer on grass.", "A deer.", "A red fox."]
    rewritten = {
        "A deer on snow.": completion("Sure! Here it is: Snow, with the tracks of an animal."),
        "A deer on sand.": completion("A young deer lies on yellow sand."),
        "A deer on grass.": completion("I'm sorry, I can't help with that."),
        "A deer.": completion("A picture."),
    }
    server.answers = lambda _, picture: completion(said[place[picture]])
    refiner.answers = lambda _, text: rewritten[text.split("\n\n")[1]]
    made, rejects = Describe(server.name, {"a": deer}, refiner.name)(pictures)
    assert [(row["caption"], row["refined_caption"], row["removed_terms"]) for row in made] == [
        ("A deer on snow.", "Snow, with the tracks of an animal.", ["deer"]),
        ("A deer on sand.", "A young animal lies on yellow sand.", ["deer"]),  # it had left the concept in
        ("A deer on grass.", "An animal on grass.", ["deer"]),  # it had refused
    ]
    assert [row["reason"] for row in rejects] == ["nothing left of the caption", "concept not in unsafe image"]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("vce_ray")] == [
        "the rules alone refine a caption: captioner refused (I'm sorry, I can't help with that.)"
    ]
    asked = [row["messages"][0]["content"][0]["text"] for row in refiner.asked]
    assert len(asked) == 4 and all("nothing of: 'deer'" in text and "say 'animal'" in text for text in asked)
    assert set(server.tokens) == {f"Bearer {TOKEN}"} and set(refiner.tokens) == {"Bearer another-token"}


def test_a_refiner_that_cannot_be_used_is_no_fault_of_a_row(
    server: Server, refiner: Server, pictures: list[dict[str, Any]], deer: Concept, tmp_path: Path
) -> None:
    refiner.answers = lambda *_: (401, {}, b"no token")
    with pytest.raises(CaptionerError, match=r"refiner http.* 401 .*VCE_RAY_REFINER_TOKEN"):
        Describe(server.name, {"a": deer}, refiner.name)(pictures)
    for name, told in (
        ("emoji-world", "refiner 'emoji-world' is no endpoint"),
        ("https://me:hunter2@host/v1#m", "VCE_RAY_REFINER_TOKEN"),
        ("http://example.com/v1#m", "refiner .* give https://"),
    ):
        with pytest.raises(ValueError, match=told):
            Run(RunConfig(concept="deer", store=str(tmp_path), refiner=name))


def test_safe_pictures_are_drawn_anew_until_the_endpoint_finds_nothing(server: Server, deer: Concept) -> None:
    said = {1: "A brown animal. Behind it is a deer.", 2: "I'm sorry, I can't.", 3: "A brown animal."}
    server.answers = lambda number, _: completion(said[number + 1])
    row = {"run": "a", "key": "s", "sample_id": "s", "prompt": "a deer", "tokens": [0] * 64}
    row["refined_caption"] = "an animal in the style of noto on a red background"
    sampling = SamplingConfig(guidance_scale=2.0, temperature=0.7)
    made, rejects = DrawSafe("emoji-world", server.name, sampling, {"a": deer}, attempts=3)([row])
    assert not rejects and made[0]["attempt"] == 3 and made[0]["check_caption"] == "A brown animal."
    server.asked.clear()
    made, rejects = DrawSafe("emoji-world", server.name, sampling, {"a": deer}, attempts=2)([row])
    assert not made and rejects[0]["reason"] == "safe image unchecked: captioner refused"
    assert rejects[0]["attempt"] == 2 and rejects[0]["detail"] == "I'm sorry, I can't."


def erase(store: Path, captioner: str, token: str, *pools: str) -> subprocess.CompletedProcess[str]:
    """The pairs of a tiny erasure, whose captions an endpoint writes."""
    sizes = ["--pairs", "4", "--keep", "2", "--steps", "1", "--judged", "2", "--judged-keep", "2", "--batch-size", "3"]
    where = ["--store", str(store), "--name", "a", "--captioner", captioner, *pools, "--pairs-only"]
    environment = os.environ | {"VCE_RAY_CAPTIONER_TOKEN": token, "VCE_RAY_CAPTIONER_DEADLINE_S": "60"}
    command = [sys.executable, "-m", "vce_ray", "erase", "deer", *sizes, *where]
    return subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)


def test_an_erasure_with_an_endpoint(server: Server, tmp_path: Path) -> None:
    """Refused for a wrong token, it goes on with the right one; the endpoint describes as the embedded model does."""
    model = base_model("emoji-world")
    lock = threading.Lock()

    def answers(number: int, picture: str) -> tuple[int, dict[str, str], bytes]:
        if server.tokens[number] != f"Bearer {TOKEN}":
            return 401, {}, b"wrong token"
        if number % 3 == 2 and len(server.asked) < 5:
            return 503, {}, b"loading"
        with lock:
            return completion(model.caption(from_png([base64.b64decode(picture)]))[0])

    server.answers = answers
    refused = erase(tmp_path, server.name, "another-token", "--actors", "1")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "401" in refused.stderr and "VCE_RAY_CAPTIONER_TOKEN" in refused.stderr
    run = Store(tmp_path).child("a")
    assert run.read_json("run.json")["status"] == "failed" and not run.stage("rejects/captions").parts()
    done = erase(tmp_path, server.name, TOKEN, "--caption-actors", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    captions, unsafe = (run.stage(name).read().to_pylist() for name in ("captions", "unsafe"))
    pictures = {row["sample_id"]: row["image"] for row in unsafe}
    assert captions
    for row in captions:
        assert row["caption"] == model.caption(from_png([pictures[row["sample_id"]]]))[0]
    assert run.stage("pairs").read().num_rows
    for told in (refused.stdout, refused.stderr, done.stdout, done.stderr, run.read_bytes("run.json").decode()):
        assert TOKEN not in told and "another-token" not in told
