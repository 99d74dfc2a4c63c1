"""A local server with the part of the Hugging Face hub's HTTP API that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_token_of_the_test"
"""The token that the server knows; it may read gated and private models."""


@dataclass
class Repo:
    """A model on the hub."""

    files: dict[str, bytes]
    access: str = "public"
    """public, gated or private."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the hub states, where they differ from those of the files."""
    cut_off: tuple[str, ...] = ()
    """Files whose download breaks off halfway."""

    @property
    def sha(self) -> str:
        """Its only commit, to which the branch main and the tag v1 point."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    @classmethod
    def of(cls, folder: Path, **settings) -> Repo:
        """Return a model with the files of a folder."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in files}, **settings)


class HubServer:
    """Serves models and records the requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        """Method and path of each request."""
        self.status: int | None = None
        """Status of every response, if the hub is to fail."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                server.requests.append(f"{self.command} {path}")
                if server.status is not None:
                    return self.answer(server.status)
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in ("", TOKEN):
                    return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
                api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").split("/")[1:]
                repo = server.repos.get("/".join(parts[:2]))
                if repo is None or (repo.access == "private" and token != TOKEN):
                    return self.answer(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
                if len(parts) > 3 and parts[3] not in ("main", "v1", repo.sha):
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                if api:
                    listed = [
                        {"type": "file", "path": name, "rfilename": name, "size": self.size(repo, name)}
                        | {"oid": self.oid(content), "blobId": self.oid(content)}
                        for name, content in repo.files.items()
                    ]
                    info = {"id": "/".join(parts[:2]), "sha": repo.sha, "siblings": listed}
                    return self.answer(200, body=json.dumps(listed if parts[2:3] == ["tree"] else info).encode())
                if repo.access == "gated" and token != TOKEN:
                    return self.answer(403 if token else 401, {"X-Error-Code": "GatedRepo"})
                name = "/".join(parts[4:])
                if name not in repo.files:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha})
                headers = {"ETag": f'"{self.oid(repo.files[name])}"', "X-Repo-Commit": repo.sha}
                self.answer(200, headers, repo.files[name], self.size(repo, name), name in repo.cut_off)

            do_HEAD = do_GET

            def size(self, repo: Repo, name: str) -> int:
                return repo.sizes.get(name, len(repo.files[name]))

            def oid(self, content: bytes) -> str:
                return hashlib.sha1(content).hexdigest()

            def answer(
                self,
                status: int,
                headers: dict[str, str] | None = None,
                body: bytes = b"",
                size: int | None = None,
                cut_off: bool = False,
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if size is None else size))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if cut_off else body)
                    if cut_off:
                        self.close_connection = True

            def log_message(self, format: str, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def downloads(self) -> list[str]:
        """Return the paths of the files that were downloaded, in order."""
        return [
            line.split("/resolve/")[1].split("/", 1)[1]
            for line in self.requests
            if line.startswith("GET /") and "/resolve/" in line
        ]


@contextmanager
def hub_server(cache: Path) -> Iterator[HubServer]:
    """Run a hub, and make huggingface_hub in this process use it and an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    server = HubServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        # huggingface_hub reads these variables when it is imported
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # it keeps connections, and the proxy it began with
        yield server
    huggingface_hub.close_session()
    server.http.shutdown()
    server.http.server_close()
    thread.join()
