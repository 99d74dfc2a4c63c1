"""What goes over the wire: the request, its limits, and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES = 16
"""Images of one request."""
MAX_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""
MAX_BODY_BYTES = 64 << 10
"""A prompt of full length fits in, whatever way its characters are escaped."""


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`. The descriptions are what an error tells the caller to give instead."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="a text of at least one word")
    n: int = Field(1, ge=1, le=MAX_IMAGES, strict=True, description=f"a whole number from 1 to {MAX_IMAGES}")
    size: str | None = Field(None, description="the model's own size, or leave it out")
    response_format: Literal["b64_json"] = Field("b64_json", description="'b64_json', or leave it out")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, strict=True, description=f"a whole number from 0 to {MAX_SEED}, or leave it out"
    )
    model: str | None = Field(None, description="the id of a model from GET /v1/models, or leave it out")
    user: str | None = Field(None, description="a text, or leave it out")
    """Accepted as OpenAI's clients send it; neither used nor kept."""

    def seeds(self, first: int) -> list[int]:
        """One seed for each image: `first` and those that follow it, from 0 again after MAX_SEED."""
        return [(first + i) % (MAX_SEED + 1) for i in range(self.n)]


class ApiError(HTTPException):
    """An error that the caller sees as `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def response(self) -> JSONResponse:
        """The answer to send."""
        return error_response(self.status_code, str(self.detail), self.param, self.code, self.headers)


def error_response(status: int, message: str, param: str | None, code: str | None, headers: Any = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    if status == 429:
        kind = "rate_limit_error"
    elif status == 401:
        kind = "authentication_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": _encodable(message), "type": kind, "param": param and _encodable(param), "code": code}
    return JSONResponse({"error": error}, status, headers)


def validation_error(problem: dict[str, Any]) -> ApiError:
    """What pydantic found, as an error that names the parameter, its value and what to give instead."""
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "it ends too early")
        return ApiError(400, f"the body is no JSON: {reason}", code="invalid_json")
    path = [str(part) for part in problem["loc"] if part != "body"]
    if not path:
        return ApiError(400, 'the body must be a JSON object like {"prompt": "..."} sent as application/json')
    param = ".".join(path)
    field = ImageRequest.model_fields.get(path[0])
    if field is None:
        known = ", ".join(ImageRequest.model_fields)
        return ApiError(400, f"unknown parameter {short(param)}: use {known}", param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"{param} is missing: give {field.description}", param=param, code="missing_parameter")
    message = f"{param}={short(problem['input'])} is refused: {problem['msg']}. Give {field.description}"
    return ApiError(400, message, param=param, code="invalid_value")


def check_prompt(prompt: str, max_chars: int) -> None:
    """Refuses an empty, overlong or undecodable prompt with ApiError 400: a bad one would fail its whole batch."""
    if not prompt.strip():
        raise ApiError(400, "prompt is empty: give a text of at least one word", param="prompt", code="empty_prompt")
    if len(prompt) > max_chars:
        message = f"prompt {short(prompt)} has {len(prompt)} characters, the limit is {max_chars}: shorten it"
        raise ApiError(400, message, param="prompt", code="prompt_too_long")
    if _encodable(prompt) != prompt:
        message = f"prompt {short(prompt)} holds half of a surrogate pair: send valid Unicode"
        raise ApiError(400, message, param="prompt", code="invalid_value")


def short(value: Any) -> str:
    """A value for a message: quoted, escaped and cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
