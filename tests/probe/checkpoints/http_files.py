"""A file server on loopback with ranges, that can also cut, lie, stall and change its mind."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GATE_S = 240  # of a body that nobody asks for


@dataclass
class Served:
    """One file, and how it misbehaves."""

    content: bytes
    etag: str | None = '"v1"'
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)  # bytes of each of the next answers
    statuses: list[int] = field(default_factory=list)  # of the next answers, instead of a file
    ranges: bool = True
    redirect: str | None = None
    gate: threading.Event | None = None  # the body waits for it
    ignore_if_range: bool = False
    then: bytes | None = None  # what is served from the second answer on


@dataclass
class Server:
    """What is served, and every request there was."""

    url: str
    files: dict[str, Served] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def add(self, path: str, content: bytes, **options: object) -> str:
        """Serve a file; returns its URL."""
        self.files[path] = Served(content, **options)  # type: ignore[arg-type]
        return f"{self.url}{path}"

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Until a condition on `requests` holds."""
        with self.arrived:
            assert self.arrived.wait_for(condition, timeout_s), self.requests

    def paths(self) -> list[str]:
        """Paths asked for, in order."""
        return [path for path, _ in self.requests]


@contextmanager
def file_server() -> Iterator[Server]:
    """A server on a free port, stopped at the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            with server.arrived:
                server.requests.append((self.path, self.headers.get("Range")))
                server.arrived.notify_all()
            _answer(self, server.files.get(self.path))

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that leave early are what is tested."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        for file in server.files.values():
            if file.gate is not None:
                file.gate.set()
        http.shutdown()
        thread.join()
        http.server_close()


def _answer(handler: BaseHTTPRequestHandler, file: Served | None) -> None:
    if file is None or file.statuses:
        status = 404 if file is None else file.statuses.pop(0)
        handler.send_response(status)
        if file is not None and status in (429, 503):
            for name, value in file.headers.items():
                handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    if file.redirect is not None:
        handler.send_response(302)
        handler.send_header("Location", file.redirect)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    begin = _begin(handler, file)
    if begin >= len(file.content) > 0 and begin:
        handler.send_response(416)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    content = file.content
    body = content[begin:]
    if file.then is not None:
        file.content, file.then = file.then, None
    handler.send_response(206 if begin else 200)
    if begin:
        last = len(content) - 1
        handler.send_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
    if file.etag is not None:
        handler.send_header("ETag", file.etag)
    for name, value in file.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if file.gate is not None:
        handler.wfile.flush()
        file.gate.wait(GATE_S)
    if file.cut_after:
        body = body[: file.cut_after.pop(0)]
        handler.close_connection = True
        handler.wfile.write(body)
        handler.wfile.flush()
        handler.connection.close()
        return
    handler.wfile.write(body)


def _begin(handler: BaseHTTPRequestHandler, file: Served) -> int:
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
    if match is None or not file.ranges:
        return 0
    validators = (file.etag, file.headers.get("Last-Modified"))
    unchanged = handler.headers.get("If-Range") in validators
    return int(match[1]) if unchanged or file.ignore_if_range else 0


def md5_etag(content: bytes) -> str:
    """The ETag an object store gives a simple upload."""
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
