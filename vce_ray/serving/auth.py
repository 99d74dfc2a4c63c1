"""Access control: who may call the endpoint.

Callers send a bearer token. Without a token the endpoint may listen on loopback only.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from vce_ray import env
from vce_ray.errors import UserError
from vce_ray.net import is_loopback
from vce_ray.serving.schema import ApiError

MIN_TOKEN_CHARS = 16


class AuthMiddleware:
    """ASGI middleware that rejects requests without the bearer token, before their body is read.

    Args:
        digest: token_digest() of the token, or None to require no token.
        public: paths that need no token.
    """

    def __init__(self, app: ASGIApp, digest: bytes | None, public: Collection[str] = ()):
        self._app = app
        self._digest = digest
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an authorized request; answer any other with 401."""
        if scope["type"] != "http" or scope["path"] in self._public or self._authorized(scope):
            await self._app(scope, receive, send)
            return
        message = "missing or invalid token: send this server's token in the header 'Authorization: Bearer <token>'"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        if self._digest is None:
            return True
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = header.partition(b" ")
        # Compare digests in constant time, so that response times reveal nothing about the token.
        matches = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._digest)
        return matches and scheme.lower() == b"bearer"


def token_digest(token: str) -> bytes:
    """Return the SHA-256 digest of the token, which is passed to replicas instead of it."""
    return hashlib.sha256(token.encode()).digest()


def check_token(token: str) -> str:
    """Return the token unchanged if it is empty, or long enough and valid in an HTTP header.

    Raises:
        UserError: the token is too short or has invalid characters. The message does not contain it.
    """
    if token and (len(token) < MIN_TOKEN_CHARS or not all("!" <= char <= "~" for char in token)):
        raise UserError(
            f"{env.API_TOKEN.name} has {len(token)} characters, or some that are invalid in an HTTP header: use at "
            f"least {MIN_TOKEN_CHARS} printable ASCII characters without spaces, such as `openssl rand -hex 24` prints"
        )
    return token


def check_host(host: str, token: str) -> None:
    """Raise UserError if other machines can reach `host` and no valid token is set."""
    check_token(token)
    if not token and not is_loopback(host):
        raise UserError(
            f"host {host!r} is reachable from other machines and {env.API_TOKEN.name} is not set: set it to a secret "
            f"of at least {MIN_TOKEN_CHARS} characters, or bind to 127.0.0.1"
        )
