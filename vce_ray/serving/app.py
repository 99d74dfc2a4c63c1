"""The HTTP ingress: validates requests, calls the engine, responds in OpenAI's format. Loads no model.

    curl localhost:8000/v1/images/generations -H 'content-type: application/json' \\
        -d '{"prompt": "a deer on a blue background", "n": 2, "seed": 7}'
"""

from __future__ import annotations

import asyncio
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

from vce_ray.serving.auth import AuthMiddleware
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
    """Ingress deployment. Its FastAPI app is built in the replica, once the engine has described its model.

    Args:
        engine: handle of the Engine deployment.
        model: model id.
        info: further fields of the model's entry in GET /v1/models.
        token_digest: token_digest() of the token that callers must send, or None.
    """

    async def __init__(self, engine: DeploymentHandle, model: str, info: dict[str, Any], token_digest: bytes | None):
        self._engine = engine
        self._info = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "vce_ray"} | info
        self._limits = await engine.describe.remote()
        self._token_digest = token_digest

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the app. Serve calls this after the constructor."""
        return build_routes(self._engine, self._info, self._limits, self._token_digest)


def build_routes(engine: DeploymentHandle, info: dict, limits: dict, digest: bytes | None) -> FastAPI:
    """Return the FastAPI app in front of one engine; `limits` is the result of Engine.describe."""
    app = FastAPI(title="vce_ray", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(AuthMiddleware, digest=digest, public=(HEALTH,))  # the middleware added last runs first
    size = f"{limits['image_size']}x{limits['image_size']}"
    card = info | {"base_revision": limits["base_revision"], "size": size}

    @app.post("/v1/images/generations")
    async def generate(body: ImageRequest) -> dict[str, Any]:
        """Generate n images of a prompt. Image i of a request with seed s has seed s + i."""
        check_prompt(body.prompt, limits["max_prompt_chars"])
        if body.size not in (None, size):
            message = f"size={short(body.size)} is not supported: this model generates {size} only; use that or omit it"
            raise ApiError(400, message, param="size", code="invalid_value")
        if body.model not in (None, card["id"]):
            message = f"model {short(body.model)} is not served here: use {card['id']!r} or omit it"
            raise ApiError(404, message, param="model", code="model_not_found")
        seeds = body.seeds(secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed)
        images = await generate_images(engine, body.prompt, seeds)
        data = [{"b64_json": image, "seed": seed} for image, seed in zip(images, seeds, strict=True)]
        return {"created": int(time.time()), "data": data, "model": card["id"]}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Return one model by its id."""
        if name != card["id"]:
            message = f"model {short(name)} is not served here: see GET /v1/models"
            raise ApiError(404, message, param="model", code="model_not_found")
        return card

    @app.get(HEALTH)
    async def healthz() -> dict[str, str]:
        """Report whether the engine responds. Needs no token."""
        await call_engine(engine, "describe", timeout_s=HEALTH_TIMEOUT_S)
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError):
        return validation_error(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def rejected(request: Request, error: HTTPException):
        if isinstance(error, ApiError):
            return error.response()
        message = f"{error.detail}: {request.method} {short(request.url.path)}"
        return error_response(error.status_code, message, None, None, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception):
        message = f"image generation failed ({type(error).__name__}): see the endpoint's log for the cause"
        return error_response(500, message, None, None)

    return app


async def generate_images(engine: DeploymentHandle, prompt: str, seeds: list[int]) -> list[str]:
    """Return one base64 PNG per seed. Raises ApiError 429 if the engine's queue is full."""
    images = await call_engine(engine, "generate", prompt, seeds, timeout_s=REQUEST_TIMEOUT_S)
    if isinstance(images, Busy):
        message = (
            f"{images.waiting} images are queued and {len(seeds)} more would exceed the limit of {images.limit}: "
            f"retry in {images.retry_after_s} s, or request fewer images"
        )
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(images.retry_after_s)})
    return images


async def call_engine(engine: DeploymentHandle, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a method of the engine. Raises ApiError 503 if the engine dies or exceeds the timeout."""
    response = getattr(engine, method).remote(*args)
    try:
        return await asyncio.wait_for(response, timeout_s)
    except TimeoutError as error:
        response.cancel()
        message = f"the engine did not respond within {timeout_s:g} s: retry later"
        raise ApiError(503, message, code="timeout", headers={"Retry-After": "30"}) from error
    except RayActorError as error:
        message = "the engine died during this request and is restarting: retry later"
        raise ApiError(503, message, code="engine_restarting", headers={"Retry-After": "30"}) from error


class BodyLimitMiddleware:
    """ASGI middleware that answers requests with more than MAX_BODY_BYTES of body with 413.

    A declared length is checked before anything is read. A body without one, sent in chunks, is counted as it arrives.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request whose declared length is within the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await _body_too_large().response()(scope, receive, send)
        else:
            await self._app(scope, _limited(receive), send)


def _limited(receive: Receive) -> Receive:
    """Wrap `receive` to raise ApiError 413 once more than MAX_BODY_BYTES have arrived."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _body_too_large()
        return message

    return limited


def _body_too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes: shorten the prompt", code="body_too_large")
