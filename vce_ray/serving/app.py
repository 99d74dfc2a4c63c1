"""The HTTP door: checks requests, hands them to the engine, answers in OpenAI's shape. Holds no model.

    curl localhost:8000/v1/images/generations -H 'content-type: application/json' \\
        -d '{"prompt": "a deer on a blue background", "n": 2, "seed": 7}'
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vce_ray.serving.batcher import Busy
from vce_ray.serving.schema import (
    MAX_BODY_BYTES,
    MAX_SEED,
    ApiError,
    ImageRequest,
    check_prompt,
    error_response,
    short,
    validation_error,
)

REQUEST_TIMEOUT_S = 300.0
HEALTH_TIMEOUT_S = 5.0
HEALTH = "/healthz"


@serve.deployment(
    max_ongoing_requests=1000,
    max_queued_requests=1000,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Api:
    """The ingress. Its app is built in the replica, once the engine has told what it serves.

    Args:
        engine: handle of the Engine deployment.
        model: id of the model, and the facts GET /v1/models tells besides.
        token_digest: token_digest() of the token that callers must send, or None.
    """

    async def __init__(self, engine: DeploymentHandle, model: str, facts: dict[str, Any], token_digest: bytes | None):
        self._engine = engine
        self._facts = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "vce_ray"} | facts
        self._limits = await engine.describe.remote()
        self._token_digest = token_digest

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return build_routes(self._engine, self._facts, self._limits, self._token_digest)


def build_routes(engine: DeploymentHandle, facts: dict, limits: dict, digest: bytes | None) -> FastAPI:
    """The FastAPI app before one engine; `limits` is what Engine.describe tells."""
    app = FastAPI(title="vce_ray", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, digest=digest)
    size = f"{limits['image_size']}x{limits['image_size']}"
    card = facts | {"base_revision": limits["base_revision"], "size": size}

    @app.post("/v1/images/generations")
    async def generate(body: ImageRequest) -> dict[str, Any]:
        """Draws n images of a prompt. Image i of a request with seed s has seed s + i."""
        check_prompt(body.prompt, limits["max_prompt_chars"])
        if body.size not in (None, size):
            message = f"size={short(body.size)} is refused: this model draws {size} only; give that or leave it out"
            raise ApiError(400, message, param="size", code="invalid_value")
        if body.model not in (None, card["id"]):
            message = f"model {short(body.model)} is not served here: give {card['id']!r} or leave it out"
            raise ApiError(404, message, param="model", code="model_not_found")
        seeds = body.seeds(secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed)
        images = await draw(engine, body.prompt, seeds)
        data = [{"b64_json": image, "seed": seed} for image, seed in zip(images, seeds, strict=True)]
        return {"created": int(time.time()), "data": data, "model": card["id"]}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of that id."""
        if name != card["id"]:
            message = f"model {short(name)} is not served here: see GET /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")
        return card

    @app.get(HEALTH)
    async def healthz() -> dict[str, str]:
        """Whether the engine answers; needs no token."""
        await answer(engine, "describe", timeout_s=HEALTH_TIMEOUT_S)
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError):
        return validation_error(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException):
        if isinstance(error, ApiError):
            return error.response()
        message = f"{error.detail}: {request.method} {short(request.url.path)}"
        return error_response(error.status_code, message, None, None, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception):
        message = f"drawing failed ({type(error).__name__}); the log of the endpoint tells why"
        return error_response(500, message, None, None)

    return app


async def draw(engine: DeploymentHandle, prompt: str, seeds: list[int]) -> list[str]:
    """Base64 PNGs from the engine. Raises ApiError 429 where too many images wait."""
    images = await answer(engine, "draw", prompt, seeds, timeout_s=REQUEST_TIMEOUT_S)
    if isinstance(images, Busy):
        message = (
            f"{images.waiting} images wait already and {len(seeds)} more would pass the limit of {images.limit}: "
            f"send the request again in {images.retry_after_s} s, or ask for fewer images"
        )
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(images.retry_after_s)})
    return images


async def answer(engine: DeploymentHandle, method: str, *args: Any, timeout_s: float) -> Any:
    """What the engine's method returns. Raises ApiError 503 where it dies or takes too long."""
    response = getattr(engine, method).remote(*args)
    try:
        return await asyncio.wait_for(response, timeout_s)
    except TimeoutError as error:
        response.cancel()
        message = f"no answer from the engine within {timeout_s:g} s: send the request again later"
        raise ApiError(503, message, code="timeout", headers={"Retry-After": "30"}) from error
    except RayActorError as error:
        message = "the engine went away while it worked on this and is being started again: send the request again"
        raise ApiError(503, message, code="engine_restarting", headers={"Retry-After": "30"}) from error


def token_digest(token: str) -> bytes:
    """What is told to replicas in place of the token."""
    return hashlib.sha256(token.encode()).digest()


class Guard:
    """ASGI middleware that comes before anything is parsed: asks for the token, and bounds the body.

    Args:
        digest: token_digest() of the token, or None to ask for none.
    """

    def __init__(self, app: ASGIApp, digest: bytes | None):
        self._app = app
        self._digest = digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is allowed in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if scope["path"] != HEALTH and not self._authorized(headers.get(b"authorization", b"")):
            message = "no token or a wrong one: send the header 'Authorization: Bearer <token>' with this server's"
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await error.response()(scope, receive, send)
        elif length.isdigit() and int(length) > MAX_BODY_BYTES:
            await too_large().response()(scope, receive, send)
        else:
            await self._app(scope, bounded(receive), send)

    def _authorized(self, header: bytes) -> bool:
        if self._digest is None:
            return True
        scheme, _, token = header.partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        return hmac.compare_digest(given, self._digest) and scheme.lower() == b"bearer"


def bounded(receive: Receive) -> Receive:
    """`receive` that raises ApiError 413 once more than MAX_BODY_BYTES have come."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise too_large()
        return message

    return counted


def too_large() -> ApiError:
    """The body has more bytes than are read."""
    return ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes: shorten the prompt", code="body_too_large")
