"""A local HTTP server with OpenAI's chat completions API, for tests of captioners and refiners."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "A brown deer stands on a red background."
Response = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class ChatServer:
    """Answers with what a test sets and records the requests."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        """Payload of each request, with its 'path'."""
        self.tokens: list[str | None] = []
        """Authorization header of each request."""
        self.respond: Callable[[int, str], Response] = lambda *_: completion(GOOD)
        """Called with the number of a request and its image (base64) or its text."""
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(payload | {"path": self.path})
                    server.tokens.append(self.headers.get("Authorization"))
                part = payload["messages"][0]["content"][0]
                subject = part.get("text") or part["image_url"]["url"].removeprefix("data:image/png;base64,")
                status, headers, body = server.respond(number, subject)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.name = f"http://127.0.0.1:{self.http.server_port}/v1#tiny"
        """Name of this endpoint as a captioner."""
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self.http.shutdown()
        self.http.server_close()


def completion(text: Any, finish: str = "stop", **message: Any) -> Response:
    """Return a chat completion as servers send it."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]}).encode()
