"""A server for Google Cloud Storage's JSON API: gcp-storage-emulator plus the precondition `ifGenerationMatch=0`.

It runs in its own process: pyarrow's GCS client holds the GIL while it waits, so a server in a thread of the same
process would never respond.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

_CREATING = threading.Lock()


class Handler(RequestHandler):
    """The emulator's handler, plus uploads of objects that must not exist yet."""

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if query.get("ifGenerationMatch") != ["0"]:
            return super().do_POST()
        with _CREATING:
            if not self._exists(url.path.split("/")[5], query["name"][0]):
                return super().do_POST()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(HTTPStatus.PRECONDITION_FAILED)

    def _exists(self, bucket: str, name: str) -> bool:
        try:
            self.storage.get_file_obj(bucket, name)
        except NotFound:
            return False
        return True


@contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """Start a server with one empty bucket on a free port; yield its host:port. It exits when its stdin is closed."""
    command = [sys.executable, __file__, bucket]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def main(bucket: str) -> None:
    """Serve until stdin is closed. The first line of output is the server's host:port."""
    storage = Storage(use_memory_fs=True)
    create_bucket(bucket, storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
    print(f"127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # without waiting for clients that keep a connection open


if __name__ == "__main__":
    main(sys.argv[1])
