"""The endpoint as its callers see it: real Ray Serve, real HTTP, an adapter that comes from an object store."""

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray import serve

from vce_ray import env
from vce_ray.config import SamplingConfig
from vce_ray.models.adapter import adapter_state, add_lora, save_adapter
from vce_ray.models.load import load_model, model_folder
from vce_ray.sampling import draw
from vce_ray.serving.batcher import Batcher, Busy
from vce_ray.serving.deploy import app_from_args, build_app, check_host, check_port, check_token, serve_command, start
from vce_ray.serving.schema import MAX_BODY_BYTES, MAX_SEED
from vce_ray.storage.store import Store

TOKEN = "a-token-for-tests-only"
SAMPLING = SamplingConfig.model_validate({"batch_size": 8})
MAX_WAITING = 24
PROMPT = "a deer on a blue background"


@pytest.fixture(scope="module")
def base_model() -> str:
    """The embedded model, where its weights are there."""
    if not (model_folder("emoji-world") / "model.safetensors").exists():
        pytest.skip("the embedded model has no weights here")
    return "emoji-world"


@pytest.fixture(scope="module")
def adapter(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, strong enough to change pictures."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(base_model)
    add_lora(model.net, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in adapter_state(model.net).items()}
    save_adapter(folder, state, model.revision, {"rank": 2, "alpha": 4}, {"concept": "deer"})
    return folder


@pytest.fixture(scope="module")
def endpoint(
    base_model: str, adapter: Path, s3_uri: Callable[[str], str], free_port: Callable[[], int]
) -> Iterator[httpx.Client]:
    """A client that knows the token, of an endpoint whose adapter lies in an object store."""
    store = Store(s3_uri("serving"))
    store.upload(adapter, "run/adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.API_TOKEN.name, TOKEN)
        ray.init("local", num_cpus=2, include_dashboard=False)
        try:
            uri = store.child("run/adapter").uri
            url = start(base_model, uri, SAMPLING, port=free_port(), max_waiting=MAX_WAITING)
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300) as client:
                yield client
        finally:
            serve.shutdown()
            ray.shutdown()


def post(client: httpx.Client, **body: object) -> httpx.Response:
    return client.post("/v1/images/generations", json={"prompt": PROMPT} | body)


def pictures(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))) for x in answer.json()["data"]]


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference between two pictures, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# Drawing --------------------------------------------------------------------------------------------------------------


def test_draws_what_the_model_with_the_adapter_draws(endpoint: httpx.Client, base_model: str, adapter: Path):
    answer = post(endpoint, n=3, seed=5)
    got = np.stack(pictures(answer))
    assert [x["seed"] for x in answer.json()["data"]] == [5, 6, 7]
    assert answer.json()["model"].endswith("-without-deer") and answer.json()["created"] > 0

    erased, base = load_model(base_model, adapter=adapter), load_model(base_model)
    want = erased.decode_pixels(draw(erased, [PROMPT] * 3, [5, 6, 7], SAMPLING))
    assert got.dtype == np.uint8 and got.shape == want.shape == (3, 64, 64, 3)
    # The same tokens; the VQ decoder's sums round otherwise with another number of threads, by one level at most.
    assert levels_apart(got, want) <= 1
    assert levels_apart(got, base.decode_pixels(draw(base, [PROMPT] * 3, [5, 6, 7], SAMPLING))) > 8


def test_a_seed_gives_one_picture_whatever_it_is_batched_with(endpoint: httpx.Client):
    prompts = [PROMPT, "a cat", "an animal in the style of openmoji " * 3]
    alone = [pictures(post(endpoint, prompt=prompt, seed=i))[0] for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(6) as pool:
        jobs = [
            (i % 3, pool.submit(post, endpoint, prompt=prompts[i % 3], seed=i % 3, n=1 + i // 3 * 2)) for i in range(6)
        ]
        together = [(i, pictures(job.result())) for i, job in jobs]
    for i, images in together:
        assert np.array_equal(images[0], alone[i])
    assert not np.array_equal(together[3][1][0], together[3][1][1]), "another seed must give another picture"


def test_without_a_seed_one_is_made_up_and_told(endpoint: httpx.Client):
    first, second = (post(endpoint).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = post(endpoint, seed=first["seed"], size="64x64", response_format="b64_json", user="someone")
    assert again.json()["data"] == [first]
    assert [x["seed"] for x in post(endpoint, seed=MAX_SEED, n=2).json()["data"]] == [MAX_SEED, 0]


def test_a_full_queue_says_when_to_come_back(endpoint: httpx.Client):
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: post(endpoint, n=16, seed=seed), range(10)))
    refused = [x for x in answers if x.status_code == 429]
    assert refused and {x.status_code for x in answers} == {200, 429}
    error = refused[0].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full") and "24" in error["message"]
    assert 1 <= int(refused[0].headers["Retry-After"]) <= 120
    assert post(endpoint).status_code == 200


# Requests that are refused --------------------------------------------------------------------------------------------

REFUSED = [
    ({"prompt": "  "}, "prompt", ["at least one word"]),
    ({"prompt": "x" * 2001}, "prompt", ["2001", "2000", "shorten"]),
    ({"prompt": "\N{DEER}" * 1000}, "prompt", ["tokens", "shorten"]),
    ({"prompt": None}, "prompt", ["None", "at least one word"]),
    ({"size": "512x512"}, "size", ["512x512", "64x64"]),
    ({"n": 0}, "n", ["n=0", "from 1 to 16"]),
    ({"n": 17}, "n", ["n=17", "from 1 to 16"]),
    ({"n": True}, "n", ["True", "from 1 to 16"]),
    ({"seed": -1}, "seed", ["-1", "from 0 to"]),
    ({"seed": MAX_SEED + 1}, "seed", [str(MAX_SEED)]),
    ({"response_format": "url"}, "response_format", ["url", "b64_json"]),
    ({"quality": "hd"}, "quality", ["quality", "response_format"]),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED)
def test_bad_parameters(endpoint: httpx.Client, body: dict, param: str, words: list[str]):
    answer = post(endpoint, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert all(word in error["message"] for word in words), error["message"]


def test_bodies_that_are_no_request(endpoint: httpx.Client):
    path, json_type = "/v1/images/generations", {"content-type": "application/json"}
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 60_000,
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
    ):
        answer = endpoint.post(path, content=content, headers=json_type)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:20]
    too_much = b" " * (MAX_BODY_BYTES + 1)
    for content in (too_much, iter([too_much[:1000], too_much])):  # with and without a length told before
        answer = endpoint.post(path, content=content, headers=json_type)
        assert answer.status_code == 413 and str(MAX_BODY_BYTES) in answer.json()["error"]["message"]
    assert len(json.dumps({"prompt": "\N{DEER}" * 2000})) < MAX_BODY_BYTES, "the longest prompt must fit in"


def test_routes_that_are_not_there(endpoint: httpx.Client):
    for answer, status in (
        (endpoint.get("/v1/nothing"), 404),
        (endpoint.get("/v1/images/generations"), 405),
        (endpoint.get("/v1/models/another"), 404),
        (post(endpoint, model="another"), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert "another" in post(endpoint, model="another").json()["error"]["message"]


def test_models_and_health(endpoint: httpx.Client):
    listed = endpoint.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list" and model["object"] == "model"
    assert (model["erased"], model["size"], len(model["base_revision"])) == ("deer", "64x64", 16)
    assert endpoint.get(f"/v1/models/{model['id']}").json() == model
    assert post(endpoint, model=model["id"]).json()["model"] == model["id"]
    assert httpx.get(endpoint.base_url.join("/healthz"), timeout=60).json() == {"status": "ok"}


def test_a_token_is_asked_for_before_anything_is_read(endpoint: httpx.Client):
    for header in ("", "Bearer", f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}", "Bearer \xe9"):
        for method, path in (("POST", "/v1/images/generations"), ("GET", "/v1/models"), ("GET", "/openapi.json")):
            headers = [(b"Authorization", header.encode("latin-1"))]
            answer = endpoint.request(method, path, headers=headers, content=b"{")
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer", (header, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_serve_elsewhere_on_the_same_cluster_is_refused(
    endpoint: httpx.Client, base_model: str, free_port: Callable[[], int]
):
    with pytest.raises(ValueError, match="Serve runs on this cluster already"):
        start(base_model, None, SAMPLING, port=free_port())
    assert endpoint.get("/healthz").status_code == 200


# What is refused before anything starts -------------------------------------------------------------------------------


def test_open_hosts_need_a_token(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]):
    monkeypatch.delenv(env.API_TOKEN.name, raising=False)
    for host in ("0.0.0.0", "::", "", "192.168.1.7", "example.com"):
        with pytest.raises(ValueError, match=env.API_TOKEN.name):
            check_host(host, "")
        check_host(host, TOKEN)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_host(host, "")
    with pytest.raises(ValueError, match="open to other machines"):
        serve_command("emoji-world", None, "0.0.0.0", free_port(), SAMPLING, block=False)
    assert not ray.is_initialized() or serve.status().applications, "nothing may have been started"


def test_weak_tokens_are_refused_and_not_repeated():
    for token in ("short", "with spaces in between it", "über-lange-geheime-token"):
        with pytest.raises(ValueError, match="openssl rand") as caught:
            check_token(token)
        assert token not in str(caught.value)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="give another port"):
            check_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(ValueError, match="65535"):
        check_port("127.0.0.1", 70000)


def test_what_build_app_refuses(base_model: str, adapter: Path, store_uri: str, tmp_path: Path):
    store = Store(store_uri)
    with pytest.raises(ValueError, match="unknown base model"):
        build_app("no-such-model", None, SAMPLING)
    with pytest.raises(ValueError, match="no adapter of vce_ray"):
        build_app(base_model, str(tmp_path), SAMPLING)
    with pytest.raises(ValueError, match="max_waiting 3"):
        build_app(base_model, None, SAMPLING, max_waiting=3)

    save_adapter(tmp_path / "other", {"x": torch.zeros(1)}, "0123456789abcdef", None, {})
    store.upload(tmp_path / "other", "adapter")
    remote = store.child("adapter").uri
    for place in (str(tmp_path / "other"), remote if "://" in remote else f"file://{remote}"):
        with pytest.raises(ValueError, match=r"base revision 0123456789abcdef, .* is [0-9a-f]{16}"):
            build_app(base_model, place, SAMPLING)
    build_app(base_model, str(adapter), SAMPLING)


def test_a_config_file_names_the_endpoint_and_wants_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VCE_RAY_API_TOKEN", raising=False)
    with pytest.raises(ValueError, match="VCE_RAY_API_TOKEN is not set"):
        app_from_args({"base": "emoji-world"})
    monkeypatch.setenv("VCE_RAY_API_TOKEN", "0123456789abcdef")
    with pytest.raises(ValueError, match="num_replica"):
        app_from_args({"num_replica": 2})
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        app_from_args({"kv_cache_dtype": "fp4"})
    app_from_args({"base": "emoji-world", "num_replicas": 2, "kv_cache_dtype": "fp8"})


# The queue before the decoder -----------------------------------------------------------------------------------------


class Tenfold:
    """Work that takes an item through `rounds` rounds, and gives ten times the item."""

    def __init__(self, rounds: int = 1, room: int = 100):
        self.rounds, self.room = rounds, room
        self.left: dict[int, int] = {}
        self.items: dict[int, int] = {}
        self.seen: list[list[int]] = []
        """The items that were underway in each round."""
        self.go = threading.Event()
        self.go.set()

    def join(self, numbers: Sequence[int], items: Sequence[int]) -> int:
        joined = max(0, self.room - len(self.left))
        for number, item in list(zip(numbers, items, strict=True))[:joined]:
            self.left[number], self.items[number] = self.rounds, item
        return min(joined, len(items))

    def advance(self) -> list[tuple[int, int]]:
        self.seen.append([self.items[number] for number in self.left])
        assert self.go.wait(30)
        if 13 in self.seen[-1]:
            raise ArithmeticError("thirteen")
        self.left = {number: left - 1 for number, left in self.left.items()}
        ended = [number for number, left in self.left.items() if left == 0]
        for number in ended:
            del self.left[number]
        return [(number, 10 * self.items[number]) for number in ended]

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.left.pop(number, None)

    async def begun(self, rounds: int = 1) -> None:
        while len(self.seen) < rounds:
            await asyncio.sleep(0.01)


def test_what_waits_joins_in_order_as_others_end():
    work = Tenfold(rounds=2)
    work.go.clear()

    async def run() -> list:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        first = asyncio.create_task(batcher.submit([0]))
        await work.begun()
        rest = [asyncio.create_task(batcher.submit(items)) for items in ([1, 2], [3, 4, 5], [6], [7, 8])]
        await asyncio.sleep(0.05)
        rest[2].cancel()
        work.go.set()
        return [await first, *await asyncio.gather(*rest, return_exceptions=True)]

    answers = asyncio.run(run())
    assert work.seen == [[0], [0, 1, 2, 3], [1, 2, 3, 4], [4, 5], [5]]
    assert answers[:3] == [[0], [10, 20], [30, 40, 50]]
    assert isinstance(answers[3], asyncio.CancelledError)
    assert answers[4] == Busy(waiting=6, limit=7, retry_after_s=2)


def test_what_has_no_room_waits_at_its_place():
    work = Tenfold(room=2)

    async def run() -> list:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        return list(await asyncio.gather(batcher.submit([1, 2, 3]), batcher.submit([4])))

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [[10, 20, 30], [40]]
    assert work.seen == [[1, 2], [3, 4]]


def test_what_nobody_waits_for_is_given_up():
    work = Tenfold(rounds=10**9)

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_batch=4, max_waiting=7)
        callers = [asyncio.create_task(batcher.submit([item])) for item in (0, 1)]
        await work.begun()
        callers[0].cancel()
        while work.seen[-1] != [1]:
            await asyncio.sleep(0.01)
        callers[1].cancel()
        while work.left:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_round_that_fails_fails_its_callers_and_no_others():
    work = Tenfold()

    async def run() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_batch=2, max_waiting=8)
        answers = await asyncio.gather(batcher.submit([13]), batcher.submit([1, 2, 4]), return_exceptions=True)
        assert isinstance(answers[0], ArithmeticError)
        assert isinstance(answers[1], ArithmeticError), "its first item was underway beside it"
        assert await batcher.submit([1, 2, 4]) == [10, 20, 40]
        batcher.check()

    asyncio.run(asyncio.wait_for(run(), 30))
