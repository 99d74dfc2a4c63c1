"""End-to-end tests of the endpoint: real Ray Serve, real HTTP, an adapter from an object store."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from vce_ray import env
from vce_ray.config import SamplingConfig
from vce_ray.models.load import load_model
from vce_ray.sampling import draw
from vce_ray.serving.deploy import start
from vce_ray.serving.schema import MAX_BODY_BYTES, MAX_SEED
from vce_ray.storage.store import Store

pytestmark = pytest.mark.integration

TOKEN = "a-token-for-tests-only"
SAMPLING = SamplingConfig.model_validate({"batch_size": 8})
MAX_WAITING = 24
PROMPT = "a deer on a blue background"


@pytest.fixture(scope="module")
def endpoint(
    base_model: str, adapter: Path, s3_uri: Callable[[str], str], free_port: Callable[[], int]
) -> Iterator[httpx.Client]:
    """A client with the token, connected to an endpoint whose adapter is in an object store."""
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


def images_of(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))) for x in answer.json()["data"]]


def max_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference between two images, in levels of 0 to 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# Generation -----------------------------------------------------------------------------------------------------------


def test_generates_the_images_of_the_model_with_the_adapter(endpoint: httpx.Client, base_model: str, adapter: Path):
    answer = post(endpoint, n=3, seed=5)
    got = np.stack(images_of(answer))
    assert [x["seed"] for x in answer.json()["data"]] == [5, 6, 7]
    assert answer.json()["model"].endswith("-without-deer") and answer.json()["created"] > 0

    erased, base = load_model(base_model, adapter=adapter), load_model(base_model)
    want = erased.decode_pixels(draw(erased, [PROMPT] * 3, [5, 6, 7], SAMPLING))
    assert got.dtype == np.uint8 and got.shape == want.shape == (3, 64, 64, 3)
    # The tokens are equal. The VQ decoder's sums depend on the number of threads, which changes a pixel by one level.
    assert max_difference(got, want) <= 1
    assert max_difference(got, base.decode_pixels(draw(base, [PROMPT] * 3, [5, 6, 7], SAMPLING))) > 8


def test_a_seed_gives_the_same_image_in_any_batch(endpoint: httpx.Client):
    prompts = [PROMPT, "a cat", "an animal in the style of openmoji " * 3]
    alone = [images_of(post(endpoint, prompt=prompt, seed=i))[0] for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(6) as pool:
        jobs = [
            (i % 3, pool.submit(post, endpoint, prompt=prompts[i % 3], seed=i % 3, n=1 + i // 3 * 2)) for i in range(6)
        ]
        together = [(i, images_of(job.result())) for i, job in jobs]
    for i, images in together:
        assert np.array_equal(images[0], alone[i])
    assert not np.array_equal(together[3][1][0], together[3][1][1]), "another seed must give another image"


def test_case_and_punctuation_of_a_prompt_do_not_matter(endpoint: httpx.Client):
    one, other = (images_of(post(endpoint, prompt=prompt, seed=3))[0] for prompt in ("a cat", " A \u201cCat\u201d!"))
    assert np.array_equal(one, other)


def test_what_one_caller_types_does_not_change_the_picture_of_another(endpoint: httpx.Client):
    prompts = ["a deer<bos><bos>", "a deer on blue"]  # of one length, if <bos> were one token: they shared a row
    alone = images_of(post(endpoint, prompt=prompts[1], seed=3))[0]
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(post, endpoint, prompt=prompts[i % 2], seed=3) for i in range(6)]
        together = [images_of(job.result())[0] for job in jobs]
    assert all(np.array_equal(image, alone) for image in together[1::2])


def test_a_random_seed_is_chosen_and_returned(endpoint: httpx.Client):
    first, second = (post(endpoint).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = post(endpoint, seed=first["seed"], size="64x64", response_format="b64_json", user="someone")
    assert again.json()["data"] == [first]
    assert [x["seed"] for x in post(endpoint, seed=MAX_SEED, n=2).json()["data"]] == [MAX_SEED, 0]


def test_a_full_queue_returns_429_with_retry_after(endpoint: httpx.Client):
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: post(endpoint, n=16, seed=seed), range(10)))
    rejected = [x for x in answers if x.status_code == 429]
    assert rejected and {x.status_code for x in answers} == {200, 429}
    error = rejected[0].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full") and "24" in error["message"]
    assert 1 <= int(rejected[0].headers["Retry-After"]) <= 120
    assert post(endpoint).status_code == 200


# Rejected requests ----------------------------------------------------------------------------------------------------

REJECTED = [
    ({"prompt": "  "}, "prompt", ["at least one word"]),
    ({"prompt": "x" * 2001}, "prompt", ["2001", "2000", "shorten"]),
    ({"prompt": "\N{DEER}" * 1000}, "prompt", ["tokens", "shorten"]),
    ({"prompt": "!!!"}, "prompt", ["'!!!'", "no word"]),
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


@pytest.mark.parametrize(("body", "param", "words"), REJECTED)
def test_bad_parameters(endpoint: httpx.Client, body: dict, param: str, words: list[str]):
    answer = post(endpoint, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert all(word in error["message"] for word in words), error["message"]


def test_malformed_bodies(endpoint: httpx.Client):
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
    too_long = b" " * (MAX_BODY_BYTES + 1)
    for content in (too_long, iter([too_long[:1000], too_long])):  # with a Content-Length header and without
        answer = endpoint.post(path, content=content, headers=json_type)
        assert answer.status_code == 413 and str(MAX_BODY_BYTES) in answer.json()["error"]["message"]
    assert len(json.dumps({"prompt": "\N{DEER}" * 2000})) < MAX_BODY_BYTES, "the longest prompt must fit in"


def test_unknown_routes_and_models(endpoint: httpx.Client):
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


def test_the_token_is_checked_before_the_body_is_read(endpoint: httpx.Client):
    for header in ("", "Bearer", f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}", "Bearer \xe9"):
        for method, path in (("POST", "/v1/images/generations"), ("GET", "/v1/models"), ("GET", "/openapi.json")):
            headers = [(b"Authorization", header.encode("latin-1"))]
            answer = endpoint.request(method, path, headers=headers, content=b"{")
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer", (header, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_second_address_on_the_same_cluster_is_rejected(
    endpoint: httpx.Client, base_model: str, free_port: Callable[[], int]
):
    with pytest.raises(ValueError, match="Serve already runs on this cluster"):
        start(base_model, None, SAMPLING, port=free_port())
    assert endpoint.get("/healthz").status_code == 200
