"""Requests, their limits, and errors in OpenAI's format."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES = 16
"""Images per request."""
MAX_SEED = 2**53 - 1
"""The largest integer that every JSON parser represents exactly."""
MAX_BODY_BYTES = 64 << 10
"""Enough for a prompt of maximum length, however its characters are escaped."""


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`. Validation errors quote a field's description as the fix."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="a string of at least one word")
    n: int = Field(1, ge=1, le=MAX_IMAGES, strict=True, description=f"an integer from 1 to {MAX_IMAGES}")
    size: str | None = Field(None, description="the model's own size, or omit it")
    response_format: Literal["b64_json"] = Field("b64_json", description="'b64_json', or omit it")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, strict=True, description=f"an integer from 0 to {MAX_SEED}, or omit it"
    )
    model: str | None = Field(None, description="the id of a model from GET /v1/models, or omit it")
    user: str | None = Field(None, description="a string, or omit it")
    """Accepted because OpenAI's clients send it; ignored and not stored."""

    def seeds(self, first: int) -> list[int]:
        """Return one seed per image: `first` and its successors, wrapping to 0 after MAX_SEED."""
        return [(first + i) % (MAX_SEED + 1) for i in range(self.n)]


class ApiError(HTTPException):
    """An error sent to the caller as `{"error": {"message", "type", "param", "code"}}`."""

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
        """Return the HTTP response for this error."""
        return error_response(self.status_code, str(self.detail), self.param, self.code, self.headers)


def error_response(status: int, message: str, param: str | None, code: str | None, headers: Any = None) -> JSONResponse:
    """Return an error response in OpenAI's format."""
    if status == 429:
        kind = "rate_limit_error"
    elif status == 401:
        kind = "authentication_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": _encodable(message), "type": kind, "param": param and _encodable(param), "code": code}
    return JSONResponse({"error": error}, status, headers)


def validation_error(problem: dict[str, Any]) -> ApiError:
    """Turn an error of pydantic into one that names the parameter, its value and a valid alternative."""
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "unexpected end of input")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
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
    message = f"{param}={short(problem['input'])} is invalid: {problem['msg']}. Give {field.description}"
    return ApiError(400, message, param=param, code="invalid_value")


def check_prompt(prompt: str, max_chars: int) -> None:
    """Raise ApiError 400 for an empty, overlong or unencodable prompt, which would fail its whole batch."""
    if not prompt.strip():
        raise ApiError(400, "prompt is empty: give a string of at least one word", param="prompt", code="empty_prompt")
    if len(prompt) > max_chars:
        message = f"prompt {short(prompt)} has {len(prompt)} characters, the limit is {max_chars}: shorten it"
        raise ApiError(400, message, param="prompt", code="prompt_too_long")
    if _encodable(prompt) != prompt:
        message = f"prompt {short(prompt)} contains an unpaired surrogate: send valid Unicode"
        raise ApiError(400, message, param="prompt", code="invalid_value")


def short(value: Any) -> str:
    """Return a value quoted, escaped and truncated for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encodable(text: str) -> str:
    """Escape unpaired surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()
