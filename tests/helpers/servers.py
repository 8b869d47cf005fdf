"""A local web server with faults: real sockets, real bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        fault = self.server.faults.get(path.name, "")
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.requests.append((path.name, int(wanted[1]) if wanted else None))
        count = sum(name == path.name for name, _ in self.server.requests)
        if fault == "404" or not path.is_file():
            return self.send_error(404)
        if fault == "500 twice" and count <= 2:
            return self.send_error(500)
        if fault == "html":
            return self._send(b"<html>sign in first</html>", {"Content-Type": "text/html"})
        data, start, code = path.read_bytes(), int(wanted[1]) if wanted else 0, 206 if wanted else 200
        if fault == "no ranges":
            start, code = 0, 200
        headers = {"Content-Type": "application/x-tar", "Content-Length": str(len(data) - start)}
        if code == 206:
            shown = start + (100 if fault == "wrong range" else 0)
            headers["Content-Range"] = f"bytes {shown}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if fault == "longer":
            headers["Content-Length"] = str(len(body) + 10)
            body += b"x" * 10
        if fault == "altered":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "altered once" and count == 1:
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault in ("cut", "wrong range", "no ranges") and count <= self.server.cuts:
            return self._send(body[: len(body) // 2], headers, code)
        if fault == "cut, unsaid" and count <= self.server.cuts:
            del headers["Content-Length"]
            return self._send(body[: len(body) // 2], headers, code)
        if fault == "always cut":
            return self._send(body[:1000], headers, code)
        if fault in ("stall", "trickle"):
            self._send(body[: 1 if fault == "trickle" else len(body) // 2], headers, code)
            self.server.stopping.wait()
            return None
        return self._send(body, headers, code)

    def _send(self, body: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.cuts = folder, {}, 1
        self.requests: list[tuple[str, int | None]] = []
        self.stopping = threading.Event()

    def handle_error(self, *_: object) -> None:  # clients that leave are part of the test
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
