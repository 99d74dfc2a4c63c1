"""Access control: tokens, hosts, and requests without a valid token. Starts neither Ray nor a server."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse

from vce_ray import env
from vce_ray.serving.auth import AuthMiddleware, check_host, check_token, token_digest

TOKEN = "a-token-for-tests-only"


def test_hosts_open_to_others_need_a_token() -> None:
    for host in ("0.0.0.0", "::", "", "192.168.1.7", "example.com"):
        with pytest.raises(ValueError, match=f"reachable from other machines and {env.API_TOKEN.name} is not set"):
            check_host(host, "")
        check_host(host, TOKEN)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_host(host, "")


def test_weak_tokens_are_rejected_and_not_repeated() -> None:
    for token in ("short", "with spaces in between it", "über-lange-geheime-token"):
        with pytest.raises(ValueError, match="openssl rand") as caught:
            check_token(token)
        assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "path", "status"),
    [
        (f"Bearer {TOKEN}", "/", 200),
        (f"bearer {TOKEN} ", "/", 200),
        (f"Bearer {TOKEN}x", "/", 401),
        (f"Basic {TOKEN}", "/", 401),
        ("", "/", 401),
        ("", "/public", 200),
    ],
)
def test_requests_need_the_token(header: str, path: str, status: int) -> None:
    app = AuthMiddleware(PlainTextResponse("ok"), token_digest(TOKEN), public=("/public",))

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path, headers={"Authorization": header})

    assert asyncio.run(get()).status_code == status
