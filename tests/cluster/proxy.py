"""An S3 server that fails: a proxy in front of a sound one, which is stopped, answers 503 or cuts uploads short.

with FaultyProxy('198.18.0.1', ('127.0.0.1', 5000)) as proxy:
    proxy.once('PUT', '/unsafe/', lambda peer: ...)      # called with the sender's address instead of passing it on
    proxy.fault = Fault.UNAVAILABLE
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
"""Is given the address of the sender; what it sent is dropped."""
ANSWER = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code><Message>Try again.</Message></Error>"
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
"""Headers that belong to one connection and are not passed on."""


class Fault(enum.Enum):
    """What ails the server."""

    NONE = "passes all on"
    STOPPED = "listens no more, and has broken all connections"
    UNAVAILABLE = "answers 503 to whatever is asked"
    CUT = "breaks the connection in the middle of what is uploaded"


class FaultyProxy:
    """Passes S3 requests on to `upstream`, as long as `fault` lets it. Usable as a context."""

    def __init__(self, address: str, upstream: tuple[str, int]):
        self.address, self.upstream, self.port = address, upstream, 0
        self.fault = Fault.NONE
        self.suffered: Counter[Fault] = Counter()
        """How many requests each fault has met; of being stopped, how often."""
        self._once: list[tuple[str, str, Action, Container[str] | None]] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def __enter__(self) -> FaultyProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens: at any free port at first, then always at that one."""
        self._server = _Server((self.address, self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Listens no more and breaks all connections: the server is gone."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.break_connections()

    def once(self, method: str, part: str, action: Action, peers: Container[str] | None = None) -> None:
        """Calls `action` at the first request from now on of this method, with `part` in its path, from these peers.
        That request is dropped."""
        with self._lock:
            self._once.append((method, part, action, peers))

    def ail(self, fault: Fault, seconds: float) -> None:
        """Has a fault from now on, for so long. Does not wait for its end."""
        self.fault = fault
        if fault is Fault.STOPPED:
            self.suffered[fault] += 1
            self.stop()
        timer = threading.Timer(seconds, self._recover)
        timer.daemon = True
        timer.start()

    def _recover(self) -> None:
        self.fault = Fault.NONE
        if self._server is None:
            self.start()

    def heal(self) -> None:
        """Ends what ails the server, and forgets the actions that still wait."""
        with self._lock:
            self._once.clear()
        self._recover()

    def drops(self, method: str, path: str, peer: str) -> bool:
        """Calls the actions that wait for such a request; whether there was one."""
        with self._lock:
            mine = [
                entry
                for entry in self._once
                if entry[0] == method and entry[1] in path and (entry[3] is None or peer in entry[3])
            ]
            self._once = [entry for entry in self._once if entry not in mine]
        for entry in mine:
            entry[2](peer)
        return bool(mine)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, place: tuple[str, int], proxy: FaultyProxy):
        self.proxy = proxy
        self.connections: set[Any] = set()
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """Asks no name server for a name of the address, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Broken connections are what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        assert isinstance(self.server, _Server)
        proxy, fault = self.server.proxy, self.server.proxy.fault
        if fault is Fault.CUT and self.command in ("PUT", "POST"):
            proxy.suffered[fault] += 1
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self._break()
            return
        body = self._body()
        if fault is Fault.UNAVAILABLE:
            proxy.suffered[fault] += 1
            self._answer(503, [("Content-Type", "application/xml")], ANSWER)
        elif proxy.drops(self.command, self.path, self.client_address[0]):
            self._break()
        else:
            self._pass_on(body, proxy.upstream)

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

    def _pass_on(self, body: bytes, place: tuple[str, int]) -> None:
        upstream = http.client.HTTPConnection(*place, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            reply = upstream.getresponse()
            headers = [(name, value) for name, value in reply.getheaders() if name.lower() not in HOP]
            self._answer(reply.status, headers, reply.read(), reply.getheader("Content-Length"))
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _break(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
