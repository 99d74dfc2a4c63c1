"""An S3 server that fails on request: a proxy in front of a working one that stops, returns 503 or cuts uploads short.

with FaultyProxy('198.18.0.1', ('127.0.0.1', 5000)) as proxy:
    proxy.once('PUT', '/unsafe/', lambda peer: ...)      # called with the client's address, instead of forwarding
    proxy.inject(Fault.UNAVAILABLE, seconds=10.0)
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Container
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Action = Callable[[str], object]
"""Takes the address of a client, whose request is then dropped."""
RESPONSE_503 = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code><Message>Try again.</Message></Error>"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
"""Headers that concern a single connection and are not forwarded."""


class Fault(enum.Enum):
    """How the server fails."""

    NONE = "forwards every request"
    STOPPED = "does not listen, and has closed all connections"
    UNAVAILABLE = "returns 503 to every request"
    CUT = "closes the connection in the middle of an upload"


class FaultyProxy:
    """Forwards S3 requests to `upstream` unless `fault` prevents it. A context manager."""

    def __init__(self, address: str, upstream: tuple[str, int]):
        self.address, self.upstream, self.port = address, upstream, 0
        self.fault = Fault.NONE
        self.failed: Counter[Fault] = Counter()
        """Number of requests that each fault made fail; for STOPPED, number of stops."""
        self._once: list[tuple[str, str, Action, Container[str] | None]] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def __enter__(self) -> FaultyProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen on a free port; after a stop, on the same port again."""
        self._server = _Server((self.address, self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and close all connections, as if the server were gone."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.close_connections()

    def once(self, method: str, part: str, action: Action, peers: Container[str] | None = None) -> None:
        """Drop the next request with this method, with `part` in its path and from these peers, and call `action`."""
        with self._lock:
            self._once.append((method, part, action, peers))

    def inject(self, fault: Fault, seconds: float) -> None:
        """Fail in this way from now on, for some seconds. Returns immediately."""
        self.fault = fault
        if fault is Fault.STOPPED:
            self.failed[fault] += 1
            self.stop()
        timer = threading.Timer(seconds, self._end_fault)
        timer.daemon = True
        timer.start()

    def _end_fault(self) -> None:
        self.fault = Fault.NONE
        if self._server is None:
            self.start()

    def recover(self) -> None:
        """End the current fault and cancel the pending actions."""
        with self._lock:
            self._once.clear()
        self._end_fault()

    def intercept(self, method: str, path: str, peer: str) -> bool:
        """Call the pending actions for such a request, and return whether there were any."""
        with self._lock:
            matching = [
                entry
                for entry in self._once
                if entry[0] == method and entry[1] in path and (entry[3] is None or peer in entry[3])
            ]
            self._once = [entry for entry in self._once if entry not in matching]
        for entry in matching:
            entry[2](peer)
        return bool(matching)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultyProxy):
        self.proxy = proxy
        self.connections: set[Any] = set()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the reverse DNS lookup that HTTPServer makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Do nothing: closed connections are expected here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        assert isinstance(self.server, _Server)
        proxy, fault = self.server.proxy, self.server.proxy.fault
        if fault is Fault.CUT and self.command in ("PUT", "POST"):
            proxy.failed[fault] += 1
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self._close()
            return
        body = self._body()
        if fault is Fault.UNAVAILABLE:
            proxy.failed[fault] += 1
            self._respond(503, [("Content-Type", "application/xml")], RESPONSE_503)
        elif proxy.intercept(self.command, self.path, self.client_address[0]):
            self._close()
        else:
            self._forward(body, proxy.upstream)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes, address: tuple[str, int]) -> None:
        upstream = http.client.HTTPConnection(*address, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            response = upstream.getresponse()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
            self._respond(response.status, headers, response.read(), response.getheader("Content-Length"))
        finally:
            upstream.close()

    def _respond(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
